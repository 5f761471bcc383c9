"""Configuration: defaults from the backbone, round trips, and one clear sentence for every mistake."""

import re

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import AutoConfig, LlamaConfig

from karla_hf import KarlaConfig
from karla_hf.modeling.configuration_karla import check_config_keys


TEXT = LlamaConfig(hidden_size=64, num_hidden_layers=6, num_attention_heads=4, vocab_size=300)


def config(**options) -> KarlaConfig:
    return KarlaConfig(text_config=TEXT, **options)


def test_defaults_are_those_that_are_described():
    made = config()
    assert [(f["order"], f["weight"]) for f in made.engram_families] == [(4, 0.1), (6, 0.2), (12, 0.3), (24, 0.4)]
    assert (made.ctm_num_ticks, made.ctm_hidden_size, made.ctm_num_neurons, made.ctm_stream_size) == (10, 512, 0, 1024)
    assert (made.ctm_history_length, made.ctm_neuron_hidden_size) == (8, 16)
    assert (made.engram_chunk_size, list(made.engram_update_periods), made.engram_max_rows) == (64, [1, 8, 64], None)
    assert (made.ctm_window, made.ctm_num_registers, made.tick_loss) == (128, 4, "last")


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(1, [0, 1]), (2, [0, 1, 2]), (3, [0, 1, 2, 3]), (6, [0, 1, 3, 4, 6]), (30, [0, 7, 15, 22, 30])],
)
def test_source_layers_are_spread_over_the_backbone(layers, expected):
    text_config = LlamaConfig(num_hidden_layers=layers)
    assert KarlaConfig(text_config=text_config).ctm_source_layers == expected


@pytest.mark.parametrize(("hidden", "expected"), [(16, 2), (64, 8), (508, 63), (512, 64), (4096, 64)])
def test_head_width_of_the_memory_fits_the_backbone(hidden, expected):
    text_config = LlamaConfig(hidden_size=hidden, num_attention_heads=1)
    assert KarlaConfig(text_config=text_config).engram_head_dim == expected


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_are_tied_as_in_the_backbone(tied):
    text_config = LlamaConfig(tie_word_embeddings=tied)
    assert KarlaConfig(text_config=text_config).tie_word_embeddings is tied


def test_saved_configuration_comes_back(tmp_path):
    families = [{"kind": "ngram", "order": 3, "weight": 1.0}]
    made = config(
        engram_families=families, engram_max_rows=99, engram_chunk_size=3, engram_update_periods=[1, 5], ctm_source_layers=[1, 6], certainty_threshold=0.5, base_model_name_or_path="a/b",
        backbone_quantization={"load_in_4bit": True}, backbone_included=False, tick_loss="two_tick",
    )  # fmt: skip
    made.save_pretrained(tmp_path)
    for loaded in (KarlaConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is KarlaConfig
        assert loaded.to_dict() == {**made.to_dict(), "_name_or_path": loaded.to_dict()["_name_or_path"]}
        assert type(loaded.text_config) is LlamaConfig
    assert set(made.auto_map) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}


def test_auto_map_of_another_repository_is_kept():
    there = {"AutoConfig": "me/karla--configuration_karla.KarlaConfig"}
    assert config(auto_map=there).auto_map == there


def test_configurations_share_no_lists():
    first, second = config(), config()
    first.engram_families[0]["order"] = 99
    first.ctm_source_layers.append(1)
    assert second.engram_families[0]["order"] == config().engram_families[0]["order"] == 4
    assert second.ctm_source_layers == [0, 1, 3, 4, 6]


def test_length_of_the_text_configuration_is_what_caches_ask_for():
    assert config().get_text_config().num_hidden_layers == 6


def family(**changes):
    return [{"kind": "ngram", "order": 4, "weight": 0.5, **changes}]


MISTAKES = {
    "no family": ({"engram_families": []}, "`engram_families` is empty, but the memory needs at least one; give an"),
    "other kind": (
        {"engram_families": family(kind="set")},
        '; each family is {"kind": "ngram" or "sentence", "order"',
    ),
    "family key": ({"engram_families": family(heads=2)}, "'heads': 2}; each family is"),
    "no weight": ({"engram_families": [{"kind": "ngram", "order": 4}]}, "; each family is"),
    "order 0": ({"engram_families": family(order=0)}, "; give an int order >= 1 and a weight > 0."),
    "order 2.5": ({"engram_families": family(order=2.5)}, "; give an int order >= 1 and a weight > 0."),
    "order in words": ({"engram_families": family(order="2")}, "; give an int order >= 1 and a weight > 0."),
    "weight 0": ({"engram_families": family(weight=0.0)}, "; give an int order >= 1 and a weight > 0."),
    "weight in words": ({"engram_families": family(weight="1")}, "; give an int order >= 1 and a weight > 0."),
    "no memory heads": ({"engram_num_heads": 0, "engram_head_dim": 8}, "`engram_num_heads` is 0; give 1 or more."),
    "no rows": ({"engram_rows_per_head": 0}, "`engram_rows_per_head` is 0; give 1 or more."),
    "room for no row": ({"engram_max_rows": 0}, "`engram_max_rows` is 0; give 1 or more."),
    "no chunk": ({"engram_chunk_size": 0}, "`engram_chunk_size` is 0; give 1 or more."),
    "no period": ({"engram_update_periods": []}, "`engram_update_periods` is []; give 1 first and then growing"),
    "slow first": (
        {"engram_update_periods": [2, 4]},
        "`engram_update_periods` is [2, 4]; give 1 first and then growing",
    ),
    "period twice": (
        {"engram_update_periods": [1, 8, 8]},
        "is [1, 8, 8]; give 1 first and then growing multiples, such",
    ),
    "no multiple": ({"engram_update_periods": [1, 8, 12]}, "is [1, 8, 12]; give 1 first and then growing multiples, "),
    "shrinking": ({"engram_update_periods": [1, 8, 4]}, "is [1, 8, 4]; give 1 first and then growing multiples, such"),
    "period 0": (
        {"engram_update_periods": [1, 0]},
        "is [1, 0]; give 1 first and then growing multiples, such as [1, 8",
    ),
    "head dim 0": ({"engram_head_dim": 0}, "`engram_head_dim` is 0; give 1 or more."),
    "memory too wide": (
        {"engram_num_heads": 8, "engram_head_dim": 9},
        "`engram_num_heads` * `engram_head_dim` is 72, but the hidden state has 64 coordinates; lower one of them.",
    ),
    "no ticks": ({"ctm_num_ticks": 0}, "`ctm_num_ticks` is 0; give 1 or more."),
    "no heads": ({"ctm_num_heads": 0}, "`ctm_num_heads` is 0; give 1 or more."),
    "no window": ({"ctm_window": 0}, "`ctm_window` is 0; give 1 or more."),
    "no registers": ({"ctm_num_registers": 0}, "`ctm_num_registers` is 0; give 1 or more."),
    "one candidate": ({"certainty_candidates": 1}, "`certainty_candidates` is 1; give 2 or more."),
    "negative neurons": ({"ctm_num_neurons": -1}, "`ctm_num_neurons` is -1; give 0 or more."),
    "negative stream": ({"ctm_stream_size": -1}, "`ctm_stream_size` is -1; give 0 or more."),
    "negative self pairs": ({"ctm_num_self_pairs": -1}, "`ctm_num_self_pairs` is -1; give 0 or more."),
    "no head at all": (
        {"ctm_num_neurons": 0, "ctm_stream_size": 0},
        "`ctm_num_neurons` and `ctm_stream_size` are both 0, which leaves no head; give one of them.",
    ),
    "no history": ({"ctm_num_neurons": 8, "ctm_history_length": 0}, "`ctm_history_length` is 0; give 1 or more."),
    "no neuron units": (
        {"ctm_num_neurons": 8, "ctm_neuron_hidden_size": 0},
        "`ctm_neuron_hidden_size` is 0; give 1 or more.",
    ),
    "no pairs": (
        {"ctm_num_neurons": 8, "ctm_num_pairs": 0, "ctm_num_self_pairs": 0},
        "`ctm_num_pairs` is 0; give 1 or more.",
    ),
    "too many self pairs": (
        {"ctm_num_pairs": 8, "ctm_num_self_pairs": 9},
        "`ctm_num_self_pairs` is 9, more than `ctm_num_pairs` (8); lower it.",
    ),
    "odd head width": (
        {"ctm_hidden_size": 24, "ctm_num_heads": 8},
        "`ctm_hidden_size` is 24; give a multiple of 2 * `ctm_num_heads` (16), since heads hold rotated pairs.",
    ),
    "no head width": ({"ctm_hidden_size": 0}, "`ctm_hidden_size` is 0; give 1 or more."),
    "threshold above 1": (
        {"certainty_threshold": 1.5},
        "`certainty_threshold` is 1.5; give a number from 0 to 1, or None to never stop.",
    ),
    "threshold below 0": ({"certainty_threshold": -0.1}, "`certainty_threshold` is -0.1; give a number from 0 to 1"),
    "other loss": ({"tick_loss": "first"}, "`tick_loss` is 'first'; give 'last', 'mean' or 'two_tick'."),
    "layer beyond the last": (
        {"ctm_source_layers": [0, 7]},
        "`ctm_source_layers` is [0, 7]; give layers from 0 (embeddings) to 6.",
    ),
    "negative layer": (
        {"ctm_source_layers": [-1]},
        "`ctm_source_layers` is [-1]; give layers from 0 (embeddings) to 6.",
    ),
    "no layer": ({"ctm_source_layers": []}, "`ctm_source_layers` is []; give layers from 0 (embeddings) to 6."),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_gets_one_clear_sentence(mistake):
    options, sentence = MISTAKES[mistake]
    with pytest.raises(StrictDataclassClassValidationError, match=re.escape(sentence)):
        config(**options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ctm_num_ticks", "3"),
        ("ctm_packed", "yes"),
        ("certainty_threshold", "0.5"),
        ("engram_rows_per_head", 1.5),
        ("engram_families", ["ngram"]),
        ("ctm_source_layers", 3),
    ],
)
def test_value_of_another_type_is_refused_by_name(name, value):
    with pytest.raises(StrictDataclassFieldValidationError, match=f"'{name}'"):
        config(**{name: value})


def test_later_assignment_is_checked_too():
    made = config()
    with pytest.raises(StrictDataclassFieldValidationError, match="'ctm_num_ticks'"):
        made.ctm_num_ticks = "many"


@pytest.mark.parametrize("threshold", [None, 0, 0.0, 0.5, 1, 1.0])
def test_threshold_may_be_any_number_from_0_to_1(threshold):
    assert config(certainty_threshold=threshold).certainty_threshold == threshold


def test_neurons_options_do_not_matter_without_neurons():
    assert config(ctm_num_neurons=0, ctm_history_length=0, ctm_num_pairs=0, ctm_num_self_pairs=0).ctm_num_neurons == 0


def test_unknown_option_is_refused_with_the_known_ones():
    check_config_keys(["ctm_num_ticks", "engram_families", "certainty_threshold", "tick_loss"])
    with pytest.raises(
        ValueError, match=r"^Unknown model options \['ctm_ticks', 'x'\]; the options are \['certainty_"
    ):
        check_config_keys(["x", "ctm_num_ticks", "ctm_ticks"])


def test_backbone_fields_are_no_options():
    with pytest.raises(ValueError, match=r"Unknown model options \['base_model_name_or_path', 'text_config'\]"):
        check_config_keys(["text_config", "base_model_name_or_path"])
