"""Configuration of a Continuous Thought Machine that stands alone."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


CTM_AUTO_MAP = {"AutoConfig": "configuration_ctm.CtmConfig", "AutoModel": "modeling_ctm.CtmModel"}
PAIR_SELECTIONS = ("first-last", "random", "random-pairing")


@strict
class CtmConfig(PreTrainedConfig):
    r"""Configuration of `CtmModel`.

    Args:
        num_ticks: T, ticks of thought.
        num_neurons: N (D in the paper).
        hidden_size: E, width of queries, keys and values.
        num_attention_heads: attention heads.
        feature_size: F, width of the features that are attended to.
        vocab_size: number of tokens of which features are made, each an embedding and its place in the sequence; None for
            a model that is given features.
        history_length: M, past pre-activations that a neuron sees.
        neuron_hidden_size: hidden units of each neuron's own model; 0 for one layer without hidden units.
        synapse_depth: 1 for one layer, more for a U-Net with so many widths.
        pair_selection: `"first-last"`, `"random"` or `"random-pairing"`; see `choose_pairs`.
        num_action_neurons: neurons chosen for the query; they make as many pairs with `"random-pairing"`, else
            n (n + 1) / 2.
        num_output_neurons: neurons chosen for the answer, likewise.
        num_self_pairs: of `"random-pairing"`, pairs that are a neuron with itself.
        output_size: numbers that are predicted at each tick.
        num_classes: classes C of one answer; a prediction is `output_size` / C answers. None for a single answer.
        dropout: rate in synapses, attention and neuron models.
        pair_seed: seed of the pairs, used once, when a model is made.

    Example:
        >>> CtmConfig(output_size=32, num_classes=2).num_answers
        16
    """

    model_type = "ctm"

    num_ticks: int = 10
    num_neurons: int = 256
    hidden_size: int = 256
    num_attention_heads: int = 8
    feature_size: int = 256
    vocab_size: int | None = None
    history_length: int = 5
    neuron_hidden_size: int = 16
    synapse_depth: int = 1
    pair_selection: str = "random-pairing"
    num_action_neurons: int = 32
    num_output_neurons: int = 32
    num_self_pairs: int = 0
    output_size: int = 2
    num_classes: int | None = None
    dropout: float | int = 0.0
    pair_seed: int = 0

    def __post_init__(self, **kwargs):
        kwargs.setdefault("auto_map", dict(CTM_AUTO_MAP))
        super().__post_init__(**kwargs)
        if self.num_classes is None:
            self.num_classes = self.output_size

    @property
    def num_answers(self) -> int:
        """Answers in one prediction."""
        return self.output_size // (self.num_classes or self.output_size)

    def validate_sizes(self):
        """Check every field."""
        for name in (
            "num_ticks",
            "num_neurons",
            "hidden_size",
            "num_attention_heads",
            "feature_size",
            "history_length",
        ):
            self._at_least(name, 1)
        for name in ("synapse_depth", "num_action_neurons", "num_output_neurons"):
            self._at_least(name, 1)
        for name in ("neuron_hidden_size", "num_self_pairs"):
            self._at_least(name, 0)
        if self.vocab_size is not None:
            self._at_least("vocab_size", 1)
        self._at_least("output_size", 2)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` is {self.hidden_size}; give a multiple of `num_attention_heads` "
                f"({self.num_attention_heads})."
            )
        classes = self.output_size if self.num_classes is None else self.num_classes
        if classes < 2 or self.output_size % classes:
            raise ValueError(
                f"`num_classes` is {classes}; give a divisor of `output_size` ({self.output_size}) of 2 or more."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"`dropout` is {self.dropout}; give a rate from 0 to below 1.")

    def validate_pairs(self):
        """Check how pairs are chosen."""
        if self.pair_selection not in PAIR_SELECTIONS:
            raise ValueError(f"`pair_selection` is {self.pair_selection!r}; give one of {', '.join(PAIR_SELECTIONS)}.")
        needed = self.num_action_neurons + self.num_output_neurons
        if self.pair_selection == "first-last" and needed > self.num_neurons:
            raise ValueError(
                f"`num_neurons` is {self.num_neurons}, but first-last needs `num_action_neurons` + `num_output_neurons` "
                f"({needed}) of them; raise it."
            )
        if self.pair_selection == "random-pairing" and self.num_self_pairs > min(
            self.num_action_neurons, self.num_output_neurons
        ):
            raise ValueError(
                f"`num_self_pairs` is {self.num_self_pairs}, more than there are pairs "
                f"({self.num_action_neurons} for queries, {self.num_output_neurons} for answers); lower it."
            )

    def _at_least(self, name: str, least: int) -> None:
        if getattr(self, name) < least:
            raise ValueError(f"`{name}` is {getattr(self, name)}; give {least} or more.")
