"""Configuration of Karla: which frozen backbone, which memory, which head."""

from itertools import pairwise

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


AUTO_MAP = {
    "AutoConfig": "configuration_karla.KarlaConfig",
    "AutoModel": "modeling_karla.KarlaModel",
    "AutoModelForCausalLM": "modeling_karla.KarlaForCausalLM",
}
DEFAULT_FAMILIES = (
    {"kind": "ngram", "order": 4, "weight": 0.1},
    {"kind": "ngram", "order": 6, "weight": 0.2},
    {"kind": "sentence", "order": 12, "weight": 0.3},
    {"kind": "sentence", "order": 24, "weight": 0.4},
)


@strict
class KarlaConfig(PreTrainedConfig):
    r"""Configuration of `KarlaModel` and `KarlaForCausalLM`.

    Args:
        text_config: configuration of the frozen backbone (L0).
        base_model_name_or_path: where the backbone comes from when the checkpoint does not hold it.
        base_model_revision: its revision on the Hub.
        base_model_source: set when the backbone was a converted copy instead of the official weights.
        backbone_quantization: `"nf4"`, `"int8"` or arguments of `BitsAndBytesConfig` for the backbone, or None.
        backbone_included: whether the checkpoint holds the backbone's weights itself.
        backbone_changed: whether those weights are others than the named model's, as after merging an adapter.
        engram_families: address families of the memory (L1), each `{"kind": "ngram", "order": n, "weight": w}`; the
            weights are the shares of a written correction. Kind `"sentence"` looks back no further than the sentence.
        engram_num_heads: heads of a row: a name's row has `engram_num_heads * engram_head_dim` coordinates.
        engram_head_dim: coordinates of the hidden state per head; None takes 64, or what fits.
        engram_rows_per_head: rows per family and head of a pack's first table; a pack grows beyond it.
        engram_max_rows: most rows of a pack's slowest level, over all families, in whole buckets of eight; None lets
            it grow.
        engram_chunk_size: positions written together: one step of the memory's clock.
        engram_update_periods: chunks between two changes of each level of the memory; the first is 1, and each is a
            multiple of the one before.
        engram_cues: whether what is read is also stored under the words around it, to be found by a question.
        engram_seed: seed of hash multipliers, used once, when a model is made.
        engram_layer_ids: blocks of the backbone, from 0, before which a module with trained rows is inserted; None
            inserts none.
        engram_layer_orders: n-gram orders that address the trained rows.
        engram_layer_num_heads: trained rows per order and position.
        engram_layer_head_dim: width of a trained row.
        engram_layer_rows_per_head: least number of trained rows per order and head (unused primes are taken).
        ctm_num_ticks: S, ticks of thought per position (L2).
        ctm_hidden_size: E, width of queries, keys and values.
        ctm_num_heads: attention heads.
        ctm_num_neurons: N, neurons of the Continuous Thought Machine beside the stream; 0, the default, leaves them out.
        ctm_history_length: M, past pre-activations that a neuron sees.
        ctm_neuron_hidden_size: hidden units of each neuron's own model.
        ctm_num_pairs: P, synchronised pairs of neurons, for queries and for the output each.
        ctm_num_self_pairs: pairs that are a neuron with itself.
        ctm_stream_size: hidden units of the looped residual stream's MLP; 0 leaves the stream out.
        ctm_window: W, positions that a position may attend to, itself included.
        ctm_num_registers: learned keys and values beside the window.
        ctm_source_layers: backbone layers whose states become keys and values, 0 for the embeddings; None takes
            embeddings, 1/4, 1/2, 3/4 and last.
        ctm_seed: seed of the pairs, used once, when a model is made.
        ctm_packed: whether ternary weights are stored with 2 bits each.
        certainty_threshold: certainty in [0, 1] at which a position stops thinking; None never stops early.
        certainty_candidates: tokens over which certainty is measured.
        tick_loss: how a thought is trained and answered. `"last"`: loss and answer at the last tick; this is what TRL's
            trainers do. `"mean"`: the mean of the losses of all ticks, and the last tick answers. `"two_tick"`: the CTM's
            loss on the best and the most certain tick of every position, and the most certain tick answers.
        ponder_cost: lambda >= 0: this times the expected ticks of a soft stopping rule is added to the loss, which the
            model then computes itself; 0 asks for nothing.

    Example:
        >>> config = KarlaConfig(ctm_num_ticks=4)
        >>> config.ctm_num_ticks, config.engram_families[0]["order"]
        (4, 4)
    """

    model_type = "karla"
    sub_configs_defaults = {"text_config": SubConfigSpec(AutoConfig, "llama")}

    text_config: dict | PreTrainedConfig | None = None
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    base_model_source: str | None = None
    backbone_quantization: str | dict | None = None
    backbone_included: bool = True
    backbone_changed: bool = False

    engram_families: list[dict] | tuple[dict, ...] = DEFAULT_FAMILIES
    engram_num_heads: int = 8
    engram_head_dim: int | None = None
    engram_rows_per_head: int = 65536
    engram_max_rows: int | None = None
    engram_chunk_size: int = 64
    engram_update_periods: list[int] | tuple[int, ...] = (1, 8, 64)
    engram_cues: bool = True
    engram_seed: int = 0
    engram_layer_ids: list[int] | None = None
    engram_layer_orders: list[int] | tuple[int, ...] = (2, 3)
    engram_layer_num_heads: int = 8
    engram_layer_head_dim: int = 32
    engram_layer_rows_per_head: int = 4096

    ctm_num_ticks: int = 10
    ctm_hidden_size: int = 512
    ctm_num_neurons: int = 0
    ctm_num_heads: int = 16
    ctm_history_length: int = 8
    ctm_neuron_hidden_size: int = 16
    ctm_num_pairs: int = 256
    ctm_num_self_pairs: int = 32
    ctm_stream_size: int = 1024
    ctm_window: int = 128
    ctm_num_registers: int = 4
    ctm_source_layers: list[int] | None = None
    ctm_seed: int = 0
    ctm_packed: bool = False
    certainty_threshold: float | int | None = None
    certainty_candidates: int = 64
    tick_loss: str = "last"
    ponder_cost: float | int = 0.0

    def __post_init__(self, **kwargs):
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__post_init__(**kwargs)
        text = self.text_config
        if not isinstance(self.engram_families, (list, tuple)):
            raise ValueError(f"`engram_families` is {self.engram_families!r}; give a list of families.")
        self.engram_families = [dict(family) for family in self.engram_families]
        self.engram_layer_orders = list(self.engram_layer_orders)
        if self.engram_head_dim is None:
            self.engram_head_dim = min(64, text.hidden_size // self.engram_num_heads)
        if self.ctm_source_layers is None:
            layers = text.num_hidden_layers
            self.ctm_source_layers = sorted({0, layers // 4, layers // 2, 3 * layers // 4, layers})
        if "tie_word_embeddings" not in kwargs:
            self.tie_word_embeddings = bool(getattr(text, "tie_word_embeddings", False))

    def validate_memory(self):
        """Check the `engram_` fields."""
        if not self.engram_families:
            raise ValueError("`engram_families` is empty, but the memory needs at least one; give an n-gram family.")
        for family in self.engram_families:
            if set(family) != {"kind", "order", "weight"} or family["kind"] not in ("ngram", "sentence"):
                raise ValueError(
                    f"`engram_families` holds {family}; each family is "
                    '{"kind": "ngram" or "sentence", "order": int >= 1, "weight": float > 0}.'
                )
            order, weight = family["order"], family["weight"]
            if not (isinstance(order, int) and order >= 1 and isinstance(weight, int | float) and weight > 0):
                raise ValueError(f"`engram_families` holds {family}; give an int order >= 1 and a weight > 0.")
        for name in ("engram_num_heads", "engram_rows_per_head", "engram_chunk_size"):
            self._at_least(name, 1)
        if self.engram_max_rows is not None:
            self._at_least("engram_max_rows", 1)
        periods = list(self.engram_update_periods)
        whole = all(isinstance(period, int) and period >= 1 for period in periods)
        if not whole or periods[:1] != [1] or any(b <= a or b % a for a, b in pairwise(periods)):
            raise ValueError(
                f"`engram_update_periods` is {periods}; give 1 first and then growing multiples, such as [1, 8, 64]."
            )
        hidden = getattr(self.text_config, "hidden_size", None)
        if hidden is not None and self.engram_head_dim is not None:
            self._at_least("engram_head_dim", 1)
            if self.engram_num_heads * self.engram_head_dim > hidden:
                raise ValueError(
                    f"`engram_num_heads` * `engram_head_dim` is {self.engram_num_heads * self.engram_head_dim}, but the "
                    f"hidden state has {hidden} coordinates; lower one of them."
                )

    def validate_trained_rows(self):
        """Check the `engram_layer_` fields."""
        for name in ("engram_layer_num_heads", "engram_layer_head_dim", "engram_layer_rows_per_head"):
            self._at_least(name, 1)
        if not self.engram_layer_orders or min(self.engram_layer_orders) < 1:
            raise ValueError(f"`engram_layer_orders` is {self.engram_layer_orders}; give orders of 1 or more.")
        layers, ids = getattr(self.text_config, "num_hidden_layers", None), self.engram_layer_ids
        if layers is None or ids is None:
            return
        if not ids or len(set(ids)) < len(ids) or not all(0 <= layer < layers for layer in ids):
            raise ValueError(
                f"`engram_layer_ids` is {ids}; give distinct blocks from 0 to {layers - 1}, or None for no trained rows."
            )

    def validate_head(self):
        """Check the `ctm_` fields, certainty and the loss."""
        for name in ("ctm_num_ticks", "ctm_hidden_size", "ctm_num_heads", "ctm_window", "ctm_num_registers"):
            self._at_least(name, 1)
        self._at_least("certainty_candidates", 2)
        for name in ("ctm_num_neurons", "ctm_stream_size", "ctm_num_self_pairs"):
            self._at_least(name, 0)
        if not self.ctm_num_neurons and not self.ctm_stream_size:
            raise ValueError(
                "`ctm_num_neurons` and `ctm_stream_size` are both 0, which leaves no head; give one of them."
            )
        if self.ctm_num_neurons:
            for name in ("ctm_history_length", "ctm_neuron_hidden_size", "ctm_num_pairs"):
                self._at_least(name, 1)
        if self.ctm_num_self_pairs > self.ctm_num_pairs:
            raise ValueError(
                f"`ctm_num_self_pairs` is {self.ctm_num_self_pairs}, more than `ctm_num_pairs` "
                f"({self.ctm_num_pairs}); lower it."
            )
        if self.ctm_hidden_size % (2 * self.ctm_num_heads):
            raise ValueError(
                f"`ctm_hidden_size` is {self.ctm_hidden_size}; give a multiple of 2 * `ctm_num_heads` "
                f"({2 * self.ctm_num_heads}), since heads hold rotated pairs."
            )
        if self.certainty_threshold is not None and not 0.0 <= self.certainty_threshold <= 1.0:
            raise ValueError(
                f"`certainty_threshold` is {self.certainty_threshold}; give a number from 0 to 1, or None to never stop."
            )
        if self.tick_loss not in ("last", "mean", "two_tick"):
            raise ValueError(f"`tick_loss` is {self.tick_loss!r}; give 'last', 'mean' or 'two_tick'.")
        if not 0.0 <= self.ponder_cost < float("inf"):
            raise ValueError(f"`ponder_cost` is {self.ponder_cost}; give 0 or more.")
        layers = getattr(self.text_config, "num_hidden_layers", None)
        if layers is None or self.ctm_source_layers is None:
            return
        if not self.ctm_source_layers or not all(0 <= layer <= layers for layer in self.ctm_source_layers):
            raise ValueError(
                f"`ctm_source_layers` is {self.ctm_source_layers}; give layers from 0 (embeddings) to {layers}."
            )

    @property
    def computes_own_loss(self) -> bool:
        """Whether the loss looks at more ticks than the one that answers, so that the model must compute it itself."""
        return self.tick_loss != "last" or self.ponder_cost > 0

    def _at_least(self, name: str, least: int) -> None:
        if not isinstance(getattr(self, name), int):
            raise ValueError(f"`{name}` is {getattr(self, name)!r}; give a whole number of {least} or more.")
        if getattr(self, name) < least:
            raise ValueError(f"`{name}` is {getattr(self, name)}; give {least} or more.")


def check_config_keys(keys) -> None:
    """Refuse keys that are no fields of `KarlaConfig`; a configuration itself keeps unknown keys without a word.

    Args:
        keys: names given by a user.

    Raises:
        ValueError: naming the unknown keys and those allowed.

    Example:
        >>> check_config_keys(["ctm_num_ticks"])
    """
    fields = {
        name
        for name in KarlaConfig.__annotations__
        if name.startswith(("engram_", "ctm_", "certainty_", "tick_", "ponder_"))
    }
    unknown = sorted(set(keys) - fields)
    if unknown:
        raise ValueError(f"Unknown model options {unknown}; the options are {sorted(fields)}.")
