"""Attention. B batch, T tokens, H query heads, K key and value heads, d head width, D model width."""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from albert_ablate.config import Config, ConfigError, Count, Positive, Range, component_arguments, target_of, trait
from albert_ablate.model.dropout import Dropout
from albert_ablate.model.placements import Placement, Sublayer

HeadWidth = Annotated[int, Range(1, 1_000_000)]


class CausalAttention(Sublayer):
    """softmax(c(Q K^T / sqrt(d)), masked to the past) V, then an output projection (Vaswani et al. 2017, 1706.03762).

    positions: learned (a table the trunk adds to the embedding), rotary (queries and keys turned by angles
    t * rotary_base^(-2i/d), Su et al. 2021, 2104.09864) or none.
    rotary_factor: what those angles are divided by, so that a longer context has the angles of a shorter one (Chen et
    al. 2023, 2306.15595). rotary_bands: low, high, C, as Llama 3.1 has it: a pair that turns more than `high` times in
    C tokens keeps its angles, one that turns less than `low` times has them divided, and one between has a mean of
    both, weighted by its turns; null: all are divided.
    kv_heads: K, each serving H / K query heads (Ainslie et al. 2023, 2305.13245); null: H. head_width: d; null: D / H.
    qk_norm: what is done to queries and keys, before positions, with a learned gain g each, 1 at first. rms_head:
    RMSNorm of each head's vector, the heads sharing g (Qwen3: 2505.09388; Gemma 3: 2503.19786). rms_whole: RMSNorm of
    all heads' vectors as one (OLMo 2: 2501.00656). layer_head: LayerNorm of each head's vector without bias, g shared
    (Dehghani et al. 2023, 2302.05442). l2: each head's vector over its length, and one g for the block instead of
    1 / sqrt(d), log2(L^2 - L) at first for a context of L (Henry et al. 2020, 2010.04245). qk_eps: added to the mean
    square of the other three.
    softcap: c(s) = softcap * tanh(s / softcap) (Gemma 2: 2408.00118); null: c(s) = s.
    window: a token sees itself and the window - 1 before it; null: all. full_every: every n-th block, counted from 1,
    sees all nevertheless (Gemma 2: 2); null: none does.
    scale: factor on Q K^T instead of 1 / sqrt(d).
    qk_clip: tau; after a step the rows of W_q and W_k of a head whose largest logit S of that step was above tau are
    multiplied by sqrt(tau / S) (QK-clip of Kimi K2: 2507.20534, where tau is 100); null: they are not.
    """

    roles = {"qkv": ("query", "key", "value"), "output": ("output",)}

    def __init__(
        self,
        width: int,
        heads: int,
        context: int,
        bias: bool,
        layer: int,
        /,
        positions: Literal["learned", "rotary", "none"] = "learned",
        rotary_base: Positive = 10_000.0,
        rotary_factor: Positive = 1.0,
        rotary_bands: tuple[Positive, Positive, Count] | None = None,
        kv_heads: HeadWidth | None = None,
        head_width: HeadWidth | None = None,
        qk_norm: Literal["none", "rms_head", "rms_whole", "layer_head", "l2"] = "none",
        qk_eps: Positive = 1e-6,
        softcap: Positive | None = None,
        window: Count | None = None,
        full_every: Count | None = None,
        scale: Positive | None = None,
        qk_clip: Positive | None = None,
    ):
        super().__init__()
        self.heads, self.context, self.positions, self.rotary_base = heads, context, positions, rotary_base
        self.rotary_factor, self.rotary_bands = rotary_factor, rotary_bands
        self.kv_heads, self.head_width = kv_heads or heads, head_width or width // heads
        self.qk_norm, self.softcap, self.scale = qk_norm, softcap, scale
        self.window = None if full_every and (layer + 1) % full_every == 0 else window
        self.inner = self.heads * self.head_width  # what enters the last matrix
        keys = self.kv_heads * self.head_width
        self.qkv = nn.Linear(width, self.inner + 2 * keys, bias=bias)
        self.output = nn.Linear(self.inner, width, bias=bias)
        self.query_norm: nn.Module
        self.key_norm: nn.Module
        if qk_norm == "rms_whole":
            self.query_norm, self.key_norm = nn.RMSNorm(self.inner, eps=qk_eps), nn.RMSNorm(keys, eps=qk_eps)
        elif qk_norm == "rms_head":
            self.query_norm, self.key_norm = (nn.RMSNorm(self.head_width, eps=qk_eps) for _ in range(2))
        elif qk_norm == "layer_head":
            self.query_norm, self.key_norm = (nn.LayerNorm(self.head_width, qk_eps, bias=False) for _ in range(2))
        elif qk_norm == "l2":
            self.cosine = CosineGain(math.log2(context**2 - context))
        self._angles: tuple[Tensor, Tensor] | None = None
        self.qk_clip = qk_clip
        self.largest: Tensor | None = None  # logit of each head since the last step, where qk_clip asks for it

    @staticmethod
    def verify(cfg: Config) -> None:
        """Refuse settings without effect, and head counts or windows that do not fit the model."""
        attention, model = cfg.attention, cfg.model
        given = component_arguments(attention)
        idle = {
            "rotary_base": (attention.positions == "rotary", "attention.positions=rotary"),
            "rotary_factor": (attention.positions == "rotary", "attention.positions=rotary"),
            "rotary_bands": (attention.rotary_factor != 1, "an attention.rotary_factor other than 1"),
            "qk_eps": (
                attention.qk_norm not in ("none", "l2"),
                "attention.qk_norm=rms_head, rms_whole or layer_head",
            ),
            "full_every": (attention.window is not None, "a window"),
        }
        for name, (used, owner) in idle.items():
            if name in given and not used:
                raise ConfigError(f"attention.{name}={given[name]} would do nothing: it belongs to {owner}.")
        bands = attention.rotary_bands
        if bands is not None and bands[0] >= bands[1]:
            raise ConfigError(f"attention.rotary_bands={bands} is not allowed: the first must be below the second.")
        if attention.qk_norm == "l2" and attention.scale is not None:
            raise ConfigError(
                f"attention.scale={attention.scale} contradicts attention.qk_norm=l2, whose gain takes its place."
            )
        if attention.qk_norm == "l2" and model.context < 3:
            raise ConfigError(f"attention.qk_norm=l2 needs a model.context above 2, not {model.context}.")
        heads, context = model.heads, model.context
        if heads % (attention.kv_heads or heads):
            raise ConfigError(
                f"attention.kv_heads={attention.kv_heads} is not allowed: it must divide model.heads={heads}."
            )
        if attention.window is not None and attention.window >= context:
            raise ConfigError(
                f"attention.window={attention.window} would do nothing: model.context={context} is not longer."
            )
        if attention.qk_clip is not None:
            _verify_qk_clip(cfg)
        if attention.full_every == 1:
            raise ConfigError(f"attention.window={attention.window} would do nothing: attention.full_every is 1.")

    def split(self, leaf: str) -> list[int]:
        if leaf != "qkv":
            return super().split(leaf)
        keys = self.kv_heads * self.head_width
        return [self.inner, keys, keys]

    def forward(self, x: Tensor, around: Placement, dropout: Dropout, heads: Dropout) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.qkv(x).split(self.split("qkv"), dim=-1)
        if self.qk_norm == "rms_whole":
            q, k = self.query_norm(q), self.key_norm(k)
        q, k, v = (z.view(B, T, -1, self.head_width).transpose(1, 2) for z in (q, k, v))
        if self.qk_norm in ("rms_head", "layer_head"):
            q, k = self.query_norm(q), self.key_norm(k)
        elif self.qk_norm == "l2":
            q, k = self.cosine(q), F.normalize(k, dim=-1)
        if self.kv_heads < self.heads:
            k, v = (z.repeat_interleave(self.heads // self.kv_heads, dim=1) for z in (k, v))
        q, k, v = around.projected(q, k, v)
        if self.positions == "rotary":
            cos, sin = self._rotation(T, q)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q, k, v = around.heads(q, k, v)
        scale = self.scale or (1.0 if self.qk_norm == "l2" else around.softmax_scale(self.head_width))
        if self.qk_clip is not None and self.training:
            self._watch(q, k, scale)
        mixed = heads(self.mix(q, k, v, scale, dropout))
        return self.output(around.leaving(mixed.transpose(1, 2).reshape(B, T, self.inner)))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: Dropout) -> Tensor:
        """softmax(c(scale q k^T), masked) v, (B, H, T, d)."""
        T = q.shape[2]
        near = None if self.window is None or self.window >= T else band(T, self.window, q.device)
        rate = dropout.attention_rate(q.device)
        if self.softcap is None:
            return F.scaled_dot_product_attention(q, k, v, near, is_causal=near is None, dropout_p=rate, scale=scale)
        scores = self.softcap * torch.tanh(q @ k.transpose(-1, -2) * (scale / self.softcap))
        seen = band(T, T, q.device) if near is None else near
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return F.dropout(weights, rate) @ v

    @torch.no_grad()
    def _watch(self, q: Tensor, k: Tensor, scale: float) -> None:
        T = q.shape[2]
        seen = band(T, min(T, self.window or T), q.device)
        largest = (q @ k.transpose(-1, -2) * scale).masked_fill_(~seen, -torch.inf).amax((0, 2, 3)).float()
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)

    @torch.no_grad()
    def clip_logits(self) -> None:
        """QK-clip, by the largest logits since it was last called, over all ranks."""
        if self.largest is None or self.qk_clip is None:
            return
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.largest, torch.distributed.ReduceOp.MAX)
        # a head whose largest logit is below tau, or negative, keeps its rows
        factor = (self.qk_clip / self.largest.clamp(min=self.qk_clip)).sqrt().to(self.qkv.weight.dtype)
        rows = factor.repeat_interleave(self.head_width).repeat(2)
        self.qkv.weight[: 2 * self.inner].mul_(rows[:, None])
        if self.qkv.bias is not None:
            self.qkv.bias[: 2 * self.inner].mul_(rows)
        self.largest = None

    def _rotation(self, T: int, like: Tensor) -> tuple[Tensor, Tensor]:
        angles = self._angles
        if angles is None or angles[0].shape[0] < T or angles[0].device != like.device or angles[0].dtype != like.dtype:
            self._angles = angles = rotary_angles(
                max(T, self.context), like.shape[-1], self.rotary_base, like, self.rotary_factor, self.rotary_bands
            )
        return angles[0][:T], angles[1][:T]


def _verify_qk_clip(cfg: Config) -> None:
    placement, written = target_of(cfg.norm._target_), f"attention.qk_clip={cfg.attention.qk_clip}"
    norms_queries = any(getattr(placement, hook) is not getattr(Placement, hook) for hook in ("heads", "projected"))
    if cfg.attention.qk_norm != "none" or norms_queries:
        raise ConfigError(f"{written} would do nothing: queries and keys are normalized after their rows.")
    contradictions = {
        "heads that share keys": (cfg.attention.kv_heads or cfg.model.heads) != cfg.model.heads,
        "model.shared=true": cfg.model.shared,
        "optimizer=schedule_free, whose averages it would miss": trait(cfg.optimizer, "averages_weights"),
        "clip=skip_step, whose skipped steps would count": trait(cfg.clip, "skips_steps"),
        "trainer.strategy=fsdp, which splits the rows": cfg.trainer.strategy == "fsdp",
    }
    for what, there in contradictions.items():
        if there:
            raise ConfigError(f"{written} is not allowed with {what}.")


class CosineGain(nn.Module):
    """g x / |x| over the last axis, g a trained number."""

    def __init__(self, initial: float):
        super().__init__()
        self.initial, self.gain = initial, nn.Parameter(torch.tensor(initial))

    def reset_parameters(self) -> None:
        """Set the gain to its initial value."""
        nn.init.constant_(self.gain, self.initial)

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * F.normalize(x, dim=-1)


def band(T: int, window: int, device: torch.device) -> Tensor:
    """Whether token t sees token s, (T, T): t - window < s <= t."""
    return torch.ones(T, T, dtype=torch.bool, device=device).tril_().triu_(1 - window)


def rotary_angles(
    T: int, dims: int, base: float, like: Tensor, factor: float = 1.0, bands: Sequence[float] | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of t * base^(-2i/dims), each (T, dims), the first half of the dimensions repeated in the second.

    factor, bands: as rotary_factor and rotary_bands of `CausalAttention`.
    """
    speeds = base ** (-torch.arange(0, dims, 2, device=like.device, dtype=torch.float64) / dims)
    if bands is not None:
        low, high, tokens = bands
        kept_share = ((speeds * tokens / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        speeds = (1 - kept_share) * speeds / factor + kept_share * speeds
    elif factor != 1:
        speeds = speeds / factor
    angles = torch.arange(T, device=like.device, dtype=torch.float64)[:, None] * speeds
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + (-x2, x1) sin with x = (x1, x2) its two halves, over the last axis (the layout of Llama)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
