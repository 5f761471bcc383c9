"""Several processes: what they read together is what one process would have read.

`torchrun` runs this file as a script (see `work` below): every process builds the same tiny Karla, reads, and saves what
it saw; the tests compare that with the same steps in this process.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cues import FACT, ID, OTHER, TEXTS
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import distributed
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import karla_hf
from karla_hf import KarlaForCausalLM
from karla_hf.modeling import sharded_karla
from karla_hf.modeling.ranks_karla import Ranks
from karla_hf.modeling.sharded_karla import owners
from karla_hf.modeling.words_karla import Lexicon


VOCAB = 300
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": VOCAB}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1, "tie_word_embeddings": True}
HEAD = {"ctm_hidden_size": 64, "ctm_num_heads": 4, "ctm_num_neurons": 16, "ctm_num_pairs": 16, "ctm_num_self_pairs": 4}
MEMORY = {"engram_rows_per_head": 50, "engram_chunk_size": 48, "engram_update_periods": [1, 3, 9]}
LENGTHS = (1700, 2, 1500, 40, 400)  # two groups of batches of windows


def make_tokenizer():
    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(2, VOCAB))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def make_karla(**options):
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, **HEADS, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    return KarlaForCausalLM.from_backbone(
        LlamaForCausalLM(config).eval(), make_tokenizer(), ctm_num_ticks=1, **HEAD, **MEMORY | options
    )


def make_texts():
    generator = np.random.default_rng(0)
    return [" ".join(f"w{i}" for i in generator.integers(2, VOCAB, length)) for length in LENGTHS]


def ask(karla):
    """Read two facts and ask for one: logits before and after, and the memory."""
    karla.engram.lexicon = Lexicon.from_texts(TEXTS + [""] * (VOCAB - len(TEXTS)))
    question = torch.tensor(
        [[ID[text] for text in ["When", " was", " the", " mill", " of", " Zorn", "ex", " founded", "?"]]]
    )
    before = karla(question).logits
    karla.read([" ".join(f"w{ID[text]}" for text in fact) for fact in (FACT, OTHER)], make_tokenizer(), progress=False)
    return {"before": before, "after": karla(question).logits, "memory": contents(karla.collect_memory())}


def facts(report):
    return {key: value for key, value in report._asdict().items() if "second" not in key}


def contents(engram):
    """Names and rows of every level of every pack, and where its clock stands."""
    if engram is None:
        return None
    packs = {}
    for name, pack in engram.packs.items():
        levels = [tuple(map(torch.from_numpy, level.items())) for level in pack.levels]
        packs[name] = {"levels": levels, "step": pack.clock.step, "tokens": pack.tokens, "lost": pack.num_lost}
    return packs


def read_and_look(karla):
    """Read, unlearn, read into another pack, and look: everything that the tests compare."""
    texts, tokenizer = make_texts(), make_tokenizer()
    ids = torch.stack([tokenizer(text, return_tensors="pt")["input_ids"][0, :30] for text in (texts[0], texts[2])])
    seen = {"ids": ids, "reports": [], "windows": [], "before": karla(ids).logits}

    def read(text, pack, **options):
        seen["windows"].append([])
        hook = karla.model.backbone.register_forward_pre_hook(
            lambda module, args, kwargs: seen["windows"][-1].append(len(kwargs["input_ids"])), with_kwargs=True
        )
        seen["reports"].append(facts(karla.read(text, tokenizer, pack=pack, progress=False, **options)))
        hook.remove()

    read(texts, "a")
    seen["after reading"] = karla(ids).logits
    seen["memory after reading"] = contents(karla.collect_memory())
    read(texts[2], "a", sign=-1)
    read(texts[3:], "b", context="open")
    read(texts[1], "c")
    karla.forget("c")
    seen["at the end"] = karla(ids).logits
    seen["memory at the end"] = contents(karla.collect_memory())
    together = karla.engram.ranks.size > 1
    seen["continuation"] = karla.generate(ids[:, :8], max_new_tokens=5, do_sample=False, synced_gpus=together)
    return seen


def refusal(function, *arguments, **options):
    with pytest.raises(ValueError, match=r"give|load it again") as refused:
        function(*arguments, **options)
    return str(refused.value)


def work(folder: Path):
    """What one of several processes does."""
    torch.set_num_threads(1)
    sharded_karla.BLOCK = 500  # so that memories of thousands of rows are sent in several messages
    distributed.init_process_group("gloo")
    rank, tokenizer, texts = distributed.get_rank(), make_tokenizer(), make_texts()
    seen = {}
    for mode in ("replicated", "sharded"):
        karla = make_karla()
        karla.distribute(mode)
        seen[mode] = read_and_look(karla)
        packs = karla.engram.packs.values()
        seen[mode]["own names"] = [torch.from_numpy(level.items()[0]) for pack in packs for level in pack.levels]
        seen[mode]["copy"] = contents(copy.deepcopy(karla).collect_memory())
        karla.save_pretrained(folder / f"{mode}-{rank}")
        karla.export_pack("a", folder / f"{mode}-a-{rank}")
        distributed.barrier()
        karla.import_pack(folder / f"{mode}-a-0", "again")
        again = karla.collect_memory()
        seen[mode]["again"] = contents(again) if again is None else contents(again)["again"]
        karla.forget("again")
        loaded = KarlaForCausalLM.from_pretrained(folder / f"{mode}-0")
        loaded.distribute("sharded")
        seen[mode]["loaded"] = contents(loaded.collect_memory())
        karla = make_karla()
        karla.distribute(mode)
        seen[mode]["question"] = ask(karla)
        seen[mode]["other texts"] = refusal(karla.read, texts[rank], tokenizer, progress=False)
        seen[mode]["other packs"] = refusal(karla.read, texts[0], tokenizer, pack=f"p{rank}", progress=False)
    full = make_karla(engram_max_rows=600, engram_update_periods=[1])
    full.distribute("sharded")
    seen["full"] = facts(full.read(texts, tokenizer, progress=False)), contents(full.collect_memory())
    ask(full)
    seen["sharded twice"] = refusal(full.distribute)
    seen["wrong mode"] = refusal(full.distribute, "scattered")
    torch.save(seen, folder / f"{rank}.pt")
    distributed.destroy_process_group()


def launch(count: int, folder: Path):
    """Run `work` in `count` processes; returns what each of them saw, and leaves there what they saved."""
    root = Path(karla_hf.__file__).parents[1]
    here = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--master-addr", "127.0.0.1", "--standalone"]
    command = [*torchrun, "--nproc-per-node", str(count), __file__, str(folder)]
    run = subprocess.run(command, env=os.environ | here, cwd=root, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt") | {"folder": folder} for rank in range(count)]


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def ranks(request, tmp_path_factory):
    return launch(request.param, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone():
    return read_and_look(make_karla())


def assert_same_contents(ours, theirs):
    """The same names at the same levels; values as far as float16 tells them apart."""
    assert list(ours) == list(theirs)
    for name, pack in ours.items():
        assert pack | {"levels": None} == theirs[name] | {"levels": None}
        for (names, rows), (other_names, other_rows) in zip(pack["levels"], theirs[name]["levels"], strict=True):
            assert torch.equal(names, other_names)
            torch.testing.assert_close(rows, other_rows, rtol=2**-10, atol=1e-5)


MODES = pytest.mark.parametrize("mode", ["replicated", "sharded"])


@MODES
def test_memory_is_that_of_one_process_and_only_rank_0_has_it_to_save(ranks, alone, mode):
    for moment in ("memory after reading", "memory at the end"):
        first, *others = (rank[mode][moment] for rank in ranks)
        assert others == [None] * len(others)
        assert_same_contents(first, alone[moment])
    assert all(len(names) for names, _ in alone["memory after reading"]["a"]["levels"])


@MODES
def test_every_rank_has_the_logits_of_one_process(ranks, alone, mode):
    moments = ["before", "after reading", "at the end"]
    for rank in ranks:
        torch.testing.assert_close(*([seen[moment] for moment in moments] for seen in (rank[mode], alone)))
        assert torch.equal(rank[mode]["continuation"], alone["continuation"])
    assert (alone["after reading"] - alone["before"]).abs().max() > 1
    assert (alone["at the end"] - alone["after reading"]).abs().max() > 1


@MODES
def test_every_rank_has_the_report_of_one_process(ranks, alone, mode):
    for rank in ranks:
        assert rank[mode]["reports"] == ranks[0][mode]["reports"]
        for ours, theirs in zip(rank[mode]["reports"], alone["reports"], strict=True):
            load = {"load": 0.0}  # shards open further tables at other moments
            assert ours | load == pytest.approx(theirs | load, rel=1e-4)
    unlearned = alone["reports"][1]
    assert unlearned["surprise_before"] < 1 < unlearned["surprise_after"]


@MODES
def test_ranks_divide_the_windows_and_may_have_none(ranks, alone, mode):
    first, *_, last = zip(*(rank[mode]["windows"] for rank in ranks), strict=True)
    assert [count for windows in first for count in windows] == alone["windows"][0]
    assert max(map(len, first)) - min(map(len, first)) <= 1
    assert last == ([1], *[[]] * (len(ranks) - 1))


def test_each_name_lives_with_its_owner_alone(ranks):
    for number, rank in enumerate(ranks):
        for names in rank["sharded"]["own names"]:
            assert (owners(names.numpy(), len(ranks)) == number).all()
    sizes = [sum(map(len, rank["sharded"]["own names"])) for rank in ranks]
    assert max(sizes) < 1.2 * min(sizes)
    torch.testing.assert_close(*(rank["replicated"]["own names"] for rank in ranks[:2]))


@MODES
def test_a_question_is_answered_as_by_one_process(ranks, mode):
    alone = ask(make_karla())
    assert (alone["after"][:, -1] - alone["before"][:, -1]).abs().max() > 1
    assert_same_contents(ranks[0][mode]["question"]["memory"], alone["memory"])
    for rank in ranks:
        torch.testing.assert_close(rank[mode]["question"]["after"], alone["after"])


@MODES
def test_rank_0_saves_what_one_process_and_several_can_load(ranks, alone, mode):
    folder = ranks[0]["folder"]
    assert not any((folder / f"{mode}-{number}").exists() for number in range(1, len(ranks)))
    loaded = KarlaForCausalLM.from_pretrained(folder / f"{mode}-0")
    assert_same_contents(contents(loaded.engram), alone["memory at the end"])
    assert_same_contents(ranks[0][mode]["loaded"], alone["memory at the end"])
    torch.testing.assert_close(loaded(alone["ids"]).logits, alone["at the end"])


@MODES
def test_a_pack_is_exported_once_imported_by_all_and_copied(ranks, mode):
    folder = ranks[0]["folder"]
    assert not any((folder / f"{mode}-a-{number}").exists() for number in range(1, len(ranks)))
    assert_same_contents(ranks[0][mode]["copy"], ranks[0][mode]["memory at the end"])
    assert_same_contents({"a": ranks[0][mode]["again"]}, {"a": ranks[0][mode]["memory at the end"]["a"]})


def test_where_rows_are_limited_all_ranks_agree_on_what_is_lost(ranks):
    reports = [rank["full"][0] for rank in ranks]
    assert all(report == reports[0] for report in reports)
    report, pack = reports[0], ranks[0]["full"][1]["default"]
    assert report["rows_lost"] > 0 < report["rows_written"] == len(pack["levels"][0][0])
    assert 0.8 < report["load"] <= 1.0


@MODES
def test_different_work_is_refused_by_all(ranks, mode):
    for rank in ranks:
        assert "were given different texts" in rank[mode]["other texts"]
        assert "were given different texts" in rank[mode]["other packs"]


def test_wrong_uses_of_distribute(ranks):
    for rank in ranks:
        assert "sharded already" in rank["sharded twice"]
        assert "'scattered'; give 'replicated'" in rank["wrong mode"]
    with pytest.raises(ValueError, match="start with torchrun or accelerate launch"):
        make_karla().distribute()


def test_shares_cover_everything_in_order():
    ranks = Ranks()
    ranks.size = 4
    assert ranks.shares(0) == [0, 0, 0, 0]
    assert ranks.shares(31) == [31, 0, 0, 0]
    assert ranks.shares(33) == [16, 17, 0, 0]
    assert ranks.shares(64) == [16, 16, 16, 16]
    ranks.rank = 1
    assert ranks.mine([16, 17, 0, 0]) == slice(16, 33)
    assert ranks.shares(3, least=1) == [1, 1, 1, 0]


if __name__ == "__main__":
    work(Path(sys.argv[1]))
