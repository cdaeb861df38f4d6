"""Mask passwords, tokens and keys in files, messages and trackers by `***`.

What is needed again is read from the environment: see `with_password`.
"""

import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from albert_ablate.config.errors import ConfigError

MASK = "***"
HANDED_ON = "ALBERT_ABLATE_TRACKER_ADDRESS"  # from a sweep to its workers, whose files hold the masked address

# scheme://user:password@host; a user name of 16 characters or more without a password is a token
_PASSWORD = re.compile(r"(?<=://)([^\s/?#:'\"<>]*):([^\s/?#'\"<>]+)@")
_TOKEN_AS_USER = re.compile(r"(?<=://)[^\s/?#:@'\"<>]{16,}@")
_PARAMETER = re.compile(
    r"(?i)([?&;](?:[a-z_\-]*(?:token|password|passwd|secret|api_?key|signature|sig))=)[^\s&;#'\"<>]+"
)
# the shapes of Hugging Face's, GitHub's, Databricks', OpenAI's, AWS's and W&B's keys
_KNOWN_KEY = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|dapi[0-9a-f]{32}|sk-(?:proj-|ant-)?\w{20,}"
    r"|AKIA[0-9A-Z]{16}|wandb_v\d_\w{30,}|local-[0-9a-f]{40})"
)
# no `*_token`: an option such as pad_token is not a secret
_SECRET_OPTION = re.compile(
    r"(?i)(?:^|_)(?:api_?key|access_?key|(?:access|api|auth|bearer)_token|password|passwd|secret)$"
)
_SECRET_VARIABLE = re.compile(r"(?i)(?:^|_)(?:api_?key|access_?key|key|token|password|passwd|secret)$")


def masked(value: Any) -> Any:
    """Mask every secret in a value's texts by `***`, through mappings and lists; their keys are left as they are.

    Secrets are passwords and tokens in addresses, keys of a known shape, what a mapping holds under a name such as
    `api_key` or `password`, and the values of environment variables with such names (WANDB_API_KEY, HF_TOKEN, ...).
    """
    return _masked(value, _environment())


def _masked(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, str):
        return _text(value, secrets)
    if isinstance(value, Mapping):
        return {
            k: MASK if isinstance(v, str) and v and _SECRET_OPTION.search(str(k)) else _masked(v, secrets)
            for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(_masked(v, secrets) for v in value)
    return value


def _text(text: str, secrets: list[str]) -> str:
    if "://" in text:
        text = _PASSWORD.sub(rf"\1:{MASK}@", text)
        text = _TOKEN_AS_USER.sub(f"{MASK}@", text)
        text = _PARAMETER.sub(rf"\1{MASK}", text)
    text = _KNOWN_KEY.sub(MASK, text)
    for secret in secrets:
        if secret in text:
            text = text.replace(secret, MASK)
    return text


def _environment() -> list[str]:
    """Values of this process's environment that are secret. One that is a plain word, as in a configuration, is not
    looked for: it would be cut out of names of options."""
    values = [
        v
        for k, v in os.environ.items()
        if _SECRET_VARIABLE.search(k) and len(v) >= 8 and not re.fullmatch("[a-z_.]+", v)
    ]
    return sorted(values, key=len, reverse=True)


def with_password(address: str, key: str) -> str:
    """`address` as it can be used: a masked password is taken from MLFLOW_TRACKING_URI, if that is the same address, or
    from MLFLOW_TRACKING_PASSWORD. Raises ConfigError where neither has it; `key` names the address in that sentence."""
    if MASK not in address:
        return address
    for name in (HANDED_ON, "MLFLOW_TRACKING_URI"):
        given = os.environ.get(name, "")
        if MASK not in given and masked(given) == address:
            return given
    parts = urlsplit(address)
    password = os.environ.get("MLFLOW_TRACKING_PASSWORD")
    if parts.password == MASK and password:
        user, _, host = parts.netloc.rpartition("@")
        return urlunsplit(parts._replace(netloc=f"{user.removesuffix(MASK)}{quote(password, safe='')}@{host}"))
    raise ConfigError(
        f"{key}={address} has no password, which is not kept in files: set MLFLOW_TRACKING_URI to the whole address, "
        "or MLFLOW_TRACKING_PASSWORD."
    )
