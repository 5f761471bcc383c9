"""Configuration of HOPE: which frozen encoder, which fast weights, which levels."""

from itertools import pairwise

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


HOPE_AUTO_MAP = {
    "AutoConfig": "configuration_hope.HopeConfig",
    "AutoModel": "modeling_hope.HopeModel",
    "AutoModelForCausalLM": "modeling_hope.HopeForCausalLM",
}
ENCODER_CONTEXTS = ("none", "lagged", "causal")
GRANITE_SMALL = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "vocab_size": 50368,
}


@strict
class HopeConfig(PreTrainedConfig):
    r"""Configuration of `HopeModel` and `HopeForCausalLM`.

    Args:
        encoder_config: configuration of the frozen sentence encoder (L0); the default has the shape of
            `ibm-granite/granite-embedding-small-english-r2`.
        encoder_name_or_path: where the encoder comes from when the checkpoint does not hold it.
        encoder_revision: its revision on the Hub.
        encoder_sha256: hash of its weights; another encoder is refused.
        encoder_included: whether the checkpoint holds the encoder's weights itself.
        encoder_context: what the encoder tells beside its embedding table. `"none"`: nothing. `"lagged"`: it encodes each
            completed chunk, which the next chunk's tokens see. `"causal"`: it encodes each chunk under a causal mask.
        hidden_size: D, that of the encoder.
        num_hidden_layers: blocks of fast weights and levels.
        num_attention_heads: H, heads of fast weights; D / H is their width.
        sequence_length: tokens of a training sequence; the model itself has no limit.
        chunk_size: C, tokens that are computed together, and that the encoder sees together.
        self_referential: whether the fast weights make their own keys, values and gates; else plain gated DeltaNet.
        snapshot_periods: tokens between two renewals of the projections that fast weights make, for as many equal groups
            of heads; multiples of C. The fastest comes first.
        conv_size: tokens that a short convolution sees.
        level_sizes: hidden units of every persistent level's MLP.
        level_periods: update period of every persistent level: steps of an optimiser, or chunks of `learn`.
        rms_norm_eps: of all norms.
        initializer_range: standard deviation of linear layers.
        use_cache: whether to return a cache outside training.
        bos_token_id: token that the encoder expects before a text, if any.
        eos_token_id: token that the encoder expects after a text, and that ends generated ones.
        pad_token_id: padding.

    Example:
        >>> config = HopeConfig(num_hidden_layers=4)
        >>> config.hidden_size, config.vocab_size, config.head_dim
        (384, 50368, 64)
    """

    model_type = "hope"
    sub_configs_defaults = {"encoder_config": SubConfigSpec(AutoConfig, "modernbert", GRANITE_SMALL)}

    encoder_config: dict | PreTrainedConfig | None = None
    encoder_name_or_path: str | None = None
    encoder_revision: str | None = None
    encoder_sha256: str | None = None
    encoder_included: bool = True
    encoder_context: str = "lagged"

    hidden_size: int = 384
    num_hidden_layers: int = 32
    num_attention_heads: int = 6
    sequence_length: int = 512
    chunk_size: int = 64
    self_referential: bool = True
    snapshot_periods: list[int] | tuple[int, ...] = (64, 128, 256)
    conv_size: int = 4
    level_sizes: list[int] | tuple[int, ...] = (768, 384, 384)
    level_periods: list[int] | tuple[int, ...] = (1, 4, 16)
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        kwargs.setdefault("auto_map", dict(HOPE_AUTO_MAP))
        kwargs.setdefault("tie_word_embeddings", True)
        super().__post_init__(**kwargs)
        self.snapshot_periods, self.level_sizes = list(self.snapshot_periods), list(self.level_sizes)
        self.level_periods = list(self.level_periods)

    @property
    def vocab_size(self) -> int:
        """Tokens of the encoder's table."""
        return self.encoder_config.vocab_size

    @property
    def head_dim(self) -> int:
        """K, width of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def head_periods(self) -> list[int]:
        """Snapshot period of every head.

        Example:
            >>> HopeConfig().head_periods
            [64, 64, 128, 128, 256, 256]
        """
        each = self.num_attention_heads // len(self.snapshot_periods)
        return [period for period in self.snapshot_periods for _ in range(each)]

    def validate_fast_weights(self):
        """Check widths, heads, chunks and snapshot periods."""
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "chunk_size", "conv_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; give 1 or more.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` is {self.hidden_size}; give a multiple of `num_attention_heads` "
                f"({self.num_attention_heads})."
            )
        periods = list(self.snapshot_periods)
        growing = all(b > a for a, b in pairwise(periods))
        if not periods or not growing or any(period < 1 or period % self.chunk_size for period in periods):
            raise ValueError(
                f"`snapshot_periods` is {periods}; give growing multiples of `chunk_size` ({self.chunk_size})."
            )
        if self.num_attention_heads % len(periods):
            raise ValueError(
                f"`snapshot_periods` has {len(periods)} entries, but the {self.num_attention_heads} heads are divided "
                "among them; give a number of entries that divides the heads."
            )

    def validate_levels(self):
        """Check the persistent levels."""
        sizes, periods = list(self.level_sizes), list(self.level_periods)
        if not sizes or len(sizes) != len(periods) or min(sizes) < 1:
            raise ValueError(
                f"`level_sizes` is {sizes} and `level_periods` is {periods}; give one size and one period per level, at "
                "least one."
            )
        if periods[0] != 1 or any(b <= a or b % a for a, b in pairwise(periods)):
            raise ValueError(
                f"`level_periods` is {periods}; give 1 first and then growing multiples, such as [1, 4, 16]."
            )

    def validate_encoder(self):
        """Check the encoder's width and context."""
        if self.encoder_context not in ENCODER_CONTEXTS:
            raise ValueError(f"`encoder_context` is {self.encoder_context!r}; give 'none', 'lagged' or 'causal'.")
        width = getattr(self.encoder_config, "hidden_size", None)
        if width is not None and width != self.hidden_size:
            raise ValueError(
                f"`hidden_size` is {self.hidden_size}, but the encoder's is {width}, and its table is the input and the "
                f"output; give {width}."
            )
