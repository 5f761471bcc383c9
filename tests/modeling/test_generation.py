"""`generate` in every mode: with and without a cache the same tokens come out."""

import pytest
import torch
from transformers import DynamicCache

from karla_hf.modeling.certainty_karla import Candidates, certainty


NEW = 14  # beyond the window of 8


@pytest.fixture
def double(make_karla, remember, random_ids):
    """A Karla in float64, so that the tokens of two ways to the same logits are the same; `prompt` is [2, 11]."""
    model = make_karla().double()
    texts = random_ids(3, 40)
    remember(model, texts)
    model.prompt = texts[:2, :11]
    return model


def generate(model, prompt=None, **options):
    prompt = model.prompt if prompt is None else prompt
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": NEW, "min_new_tokens": NEW, **options}
    return model.generate(prompt, do_sample=options.pop("do_sample", False), **options)


def greedy(model, prompt, new=NEW, **options):
    """Greedy decoding by the whole forward pass for every token."""
    ids = prompt
    with torch.no_grad():
        for _ in range(new):
            logits = model(ids, use_cache=False, **options).logits[:, -1]
            logits[:, 1] = -torch.inf  # as min_new_tokens forbids the end
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids


def test_greedy_equals_the_whole_forward_pass(double):
    expected = greedy(double, double.prompt)
    assert torch.equal(generate(double), expected)
    assert torch.equal(generate(double, use_cache=False), expected)
    assert len(expected[0, 11:].unique()) > 3, "the random model does not repeat one token"


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_every_cache_gives_the_same_tokens(double, cache):
    assert torch.equal(generate(double, cache_implementation=cache), generate(double, use_cache=False))


def test_memory_and_head_take_part(double):
    spoken = generate(double)
    double.use_memory(False)
    assert not torch.equal(generate(double), spoken)
    double.use_memory(True)
    assert torch.equal(generate(double), spoken)


def test_memory_is_recalled_by_generation(make_karla, remember, random_ids):
    """What was read comes out word by word, from a silent head."""
    karla, ids = make_karla(speaks=False), random_ids(1, 30)
    assert not torch.equal(generate(karla, ids[:, :6], max_new_tokens=24), ids)
    remember(karla, ids)
    assert torch.equal(generate(karla, ids[:, :6], max_new_tokens=24, min_new_tokens=None), ids)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True}, {"do_sample": True, "num_beams": 2}])
@pytest.mark.parametrize("sequences", [1, 2])
def test_sampling_and_beams_are_the_same_without_a_cache(double, options, sequences):
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        outputs.append(generate(double, use_cache=use_cache, num_return_sequences=sequences, **options))
    assert torch.equal(*outputs)
    assert outputs[0].shape == (2 * sequences, 11 + NEW)


def test_samples_follow_their_seed(double):
    samples = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        samples.append(generate(double, do_sample=True))
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


def test_beams_score_no_less_than_greedy(double):
    def score(sequences):
        logits = double(sequences, use_cache=False).logits[:, 10:-1]
        return logits.log_softmax(-1).gather(-1, sequences[:, 11:, None]).sum((1, 2))

    with torch.no_grad():
        assert (score(generate(double, num_beams=8)) >= score(generate(double)) - 1e-9).all()


def test_batch_with_left_padding_gives_the_tokens_of_each_alone(double):
    alone = [generate(double, double.prompt[:1, 5:]), generate(double, double.prompt[1:])]
    ids, mask = double.prompt.clone(), torch.ones_like(double.prompt)
    ids[0, :5], mask[0, :5] = 0, 0
    together = generate(double, ids, attention_mask=mask)
    assert torch.equal(together[0, 5:], alone[0][0])
    assert torch.equal(together[1], alone[1][0])


@pytest.mark.parametrize("schedule", ["constant", "heuristic"])
def test_assisted_generation_equals_greedy(double, make_backbone, schedule):
    assistant = make_backbone(num_hidden_layers=1).double()
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.num_assistant_tokens_schedule = schedule
    prompt = double.prompt[:1]
    assert torch.equal(generate(double, prompt, assistant_model=assistant), greedy(double, prompt))


def test_a_karla_assists_itself(double):
    prompt = double.prompt[:1]
    assert torch.equal(generate(double, prompt, assistant_model=double), greedy(double, prompt))


def test_karla_assists_its_backbone(double, make_backbone):
    target = make_backbone().double()
    prompt = double.prompt[:1]
    expected = target.generate(prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    found = target.generate(prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, assistant_model=double)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("lookup", [2, 6])
def test_prompt_lookup_equals_greedy(double, lookup):
    start = greedy(double, double.prompt[:1], 4)
    prompt = torch.cat([start, start], dim=1)  # repeats itself, so that there is something to look up
    assert torch.equal(generate(double, prompt, prompt_lookup_num_tokens=lookup), greedy(double, prompt))


def test_generation_continues_from_a_returned_cache(double):
    expected = generate(double, max_new_tokens=NEW, min_new_tokens=NEW)
    first = generate(double, max_new_tokens=6, min_new_tokens=6, return_dict_in_generate=True)
    assert isinstance(first.past_key_values, DynamicCache)
    rest = generate(
        double, first.sequences, past_key_values=first.past_key_values, max_new_tokens=NEW - 6, min_new_tokens=NEW - 6
    )
    assert torch.equal(rest, expected)


def test_second_turn_continues_from_the_first(double, random_ids):
    first = generate(double, return_dict_in_generate=True)
    turn = torch.cat([first.sequences, random_ids(2, 5)], dim=1)
    expected = greedy(double, turn, 5)
    found = generate(double, turn, past_key_values=first.past_key_values, max_new_tokens=5, min_new_tokens=5)
    assert torch.equal(found, expected)


def test_cache_of_the_bare_backbone_is_refused(double):
    cache = double.model.backbone(double.prompt, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="holds 11 positions but no Karla layer"):
        generate(double, torch.cat([double.prompt, double.prompt[:, :1]], dim=1), past_key_values=cache)


@pytest.mark.parametrize("ticks", [1, 2, 5])
def test_ticks_are_set_for_one_generation(double, ticks):
    assert torch.equal(generate(double, max_ticks=ticks), greedy(double, double.prompt, max_ticks=ticks))
    assert double.config.ctm_num_ticks == 3


def test_bad_ticks_are_refused(double):
    with pytest.raises(ValueError, match=r"max_ticks is 0; give 1 or more\."):
        generate(double, max_ticks=0)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 1.0])
def test_halted_generation_equals_the_choice_with_all_ticks_in_hand(double, threshold):
    """Every token is that of the first tick whose certainty reaches the threshold, tick 0 included."""
    found = generate(double, certainty_threshold=threshold)
    with torch.no_grad():
        out = double.model(found, use_cache=False, all_ticks=True)
    state = (out.last_hidden_state - out.tick_deltas[-1]).flatten(0, 1)
    deltas = torch.cat([torch.zeros_like(state)[None], out.tick_deltas.flatten(1, 2)])
    candidates = Candidates(state, *double.model.output_projection(), double.config.certainty_candidates)
    reached = torch.stack([certainty(candidates.logits(state + delta)) for delta in deltas]) >= threshold
    reached[-1] = True
    ticks = reached.int().argmax(0)
    logits = double.lm_head(state + deltas[ticks, torch.arange(len(state))])
    logits[:, 1] = -torch.inf
    assert torch.equal(logits.argmax(-1).view(2, -1)[:, 10:-1], found[:, 11:])
    assert torch.equal(double(found, certainty_threshold=threshold).ticks_used.flatten(), ticks)
    if threshold in (0.3, 0.5):
        assert len(ticks.unique()) > 1
    if threshold == 0.0:
        assert not ticks.any()


def test_threshold_of_the_configuration_holds_for_generation(make_karla, random_ids):
    karla, prompt = make_karla(certainty_threshold=0.4), random_ids(1, 8)
    expected = generate(karla, prompt)
    karla.config.certainty_threshold = None
    assert torch.equal(generate(karla, prompt, certainty_threshold=0.4), expected)


def test_two_tick_karla_generates_its_surest_tick(make_karla, random_ids):
    karla, prompt = make_karla(tick_loss="two_tick").double(), random_ids(1, 8)
    assert torch.equal(generate(karla, prompt), greedy(karla, prompt))


def test_generation_in_training_mode_has_a_cache_too(double):
    """TRL generates between two steps."""
    expected = generate(double)
    double.train()
    assert torch.equal(generate(double), expected)
    assert double.model.ctm.training


def test_scores_are_logits_of_the_whole(double):
    out = generate(double, output_logits=True, output_scores=True, return_dict_in_generate=True)
    whole = double(out.sequences, use_cache=False).logits[:, 10:-1]
    torch.testing.assert_close(torch.stack(out.logits, dim=1).double(), whole, rtol=0, atol=1e-5)


def test_generation_settings_of_the_backbone_are_kept(make_backbone, make_karla):
    backbone = make_backbone()
    backbone.generation_config.temperature, backbone.generation_config.do_sample = 0.3, True
    assert make_karla(backbone).generation_config.temperature == 0.3


def test_text_can_be_streamed(double, tokenizer, capsys):
    from transformers import TextStreamer

    found = generate(double, double.prompt[:1], streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.split() == tokenizer.decode(found[0, 11:]).split()
