"""What every placement is: where it stands, what it may be asked, and what it may refuse."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from albert_ablate.config import Config, ConfigError

if TYPE_CHECKING:
    from albert_ablate.model.decoder import Decoder

Branch = Callable[[Tensor], Tensor]
LAST = ("output", "down")  # roles of a sublayer's last matrix


@dataclass(frozen=True)
class Site:
    """Where a placement stands: `layer` of `layers` blocks from 0, around "attention" or "mlp".

    norm(width) makes a new norm. rows is the width of what the sublayer's first matrix gives, inner that of what enters
    its last. sibling is the placement around the same block's attention, for the MLP. gated: the MLP is.
    """

    norm: Callable[[int], nn.Module]
    layer: int
    layers: int
    sublayer: str
    width: int
    rows: int
    inner: int
    heads: int
    vocabulary: int
    sibling: "Placement | None" = None
    gated: bool = False


class Sublayer(nn.Module):
    """Attention or MLP: called with x (B, T, D), the placement around it and the dropout inside it.

    roles: the role of each part of the rows of its matrices, by matrix. inner: width of what enters the last matrix.
    """

    roles: dict[str, tuple[str, ...]]
    inner: int

    @property
    def rows(self) -> int:
        """Width of what the first matrix gives."""
        return getattr(self, next(iter(self.roles))).out_features

    def split(self, leaf: str) -> list[int]:
        """How many rows of the matrix `leaf` play each of its roles; equally many where not said otherwise."""
        rows, roles = getattr(self, leaf).out_features, self.roles[leaf]
        return [rows // len(roles)] * len(roles)


class Placement(nn.Module):
    """x + f(x) and what belongs to it; the base of every placement.

    The residual stream that is handed from sublayer to sublayer is what `begin` makes of the embedding: a tensor, or
    a tuple of tensors where a placement carries more than one.
    """

    uses_norm = True
    final_norm = True
    embedding_norm = False
    # traits, see config.traits
    normalizes_embedding = False
    rewrites_weights = False
    starts_from_zero = False
    scales_tied = True  # where head and embedding are one: times sqrt(D) on entry

    def __init__(self, site: Site, /):
        super().__init__()
        self.first = site.layer == 0 and site.sublayer == "attention"  # the stream comes in here
        self.last = site.layer == site.layers - 1 and site.sublayer == "mlp"  # and leaves here

    def forward(self, x: Any, f: Branch) -> Any:
        raise NotImplementedError

    # --- at initialization -------------------------------------------------------------------------------------------

    def gain(self, role: str) -> float:
        """Factor on the standard deviation of the draw of the matrix that plays `role`: query, key, value, output
        (attention), up, gate, down (MLP)."""
        return 1.0

    def std(self, role: str, usual: float, rows: int, columns: int) -> float:
        """Standard deviation of the draw of the matrix that plays `role`, rows x columns; `usual` is Xavier's."""
        return usual * self.gain(role)

    def trunk_std(self, role: str, usual: float, rows: int, columns: int) -> float:
        """The same for embedding and positions, asked of the first placement, and for head, asked of the last."""
        return usual

    def prepare(self, model: "Decoder") -> None:
        """Called once for each placement, first to last, when all parameters have their initial values."""

    # --- at the ends of the trunk ------------------------------------------------------------------------------------

    def begin(self, x: Tensor) -> Any:
        """From the embedding (B, T, D) to the stream; asked of the first placement."""
        return x

    def finish(self, x: Any, norm: nn.Module) -> Tensor:
        """From the stream to what enters the head (B, T, D), `norm` being the final norm; asked of the last."""
        return norm(x)

    def logits(self, z: Tensor) -> Tensor:
        """Logits (B, T, V) from what the head gives; asked of the last."""
        return z

    # --- inside the sublayer -----------------------------------------------------------------------------------------

    def softmax_scale(self, head_width: int) -> float:
        """Factor on q k^T before the softmax."""
        return head_width**-0.5

    def projected(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, T, d), before positions are turned into them."""
        return q, k, v

    def heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, T, d), positions already in them, before they meet."""
        return q, k, v

    def hidden(self, h: Tensor) -> Tensor:
        """What enters the MLP's activation, (B, T, rows of the matrix before it)."""
        return h

    def linear(self, h: Tensor) -> Tensor:
        """The linear half of a gated MLP, (B, T, inner), before it is multiplied with what leaves the activation."""
        return h

    def leaving(self, h: Tensor) -> Tensor:
        """What enters the sublayer's last matrix, (B, T, inner)."""
        return h

    # --- in training -------------------------------------------------------------------------------------------------

    def multipliers(self, role: str) -> dict[str, float]:
        """Factors on the optimizer's lr, weight_decay and eps for the parameters that play `role`: those of `gain`,
        embedding, positions, head, embedding_norm, final_norm, and norm (in a block, any gain, bias or gate with fewer
        than two dimensions)."""
        return {}

    def after_step(self, sublayer: Sublayer, model: "Decoder") -> None:
        """Called without gradients after each step of the optimizer, and once after `prepare`."""


def refuse_qk_norm(cfg: Config) -> None:
    """For a placement that normalizes queries and keys itself, at width / heads."""
    head_width, even = cfg.attention.get("head_width"), cfg.model.width / cfg.model.heads
    if head_width not in (None, even):
        raise ConfigError(
            f"attention.head_width={head_width} is not allowed with norm={cfg.option('norm')}, whose norms of queries "
            f"and keys are model.width / model.heads = {even:g} wide."
        )
    given = cfg.attention.get("qk_norm")
    if given not in (None, "none"):
        raise ConfigError(
            f"attention.qk_norm={given} contradicts norm={cfg.option('norm')}, which normalizes queries and keys "
            "itself: leave it out."
        )
