"""The speeds that a Karla is judged by are measured on what they name."""

import pytest
import torch
from tiny import OPTIONS, make_backbone, make_tokenizer, speak

from karla_hf import KarlaForCausalLM
from karla_hf.modeling import head_karla
from karla_hf.speed import tick_results


@pytest.mark.parametrize("neurons", [0, 32])
def test_ticks_are_measured_in_torch_and_compiled_against_a_step(monkeypatch, neurons):
    options = {**OPTIONS, "ctm_num_neurons": neurons}
    karla = speak(KarlaForCausalLM.from_backbone(make_backbone(), make_tokenizer(), **options))
    calls = []
    compiled = head_karla.compiled_ticks

    def counted(head, thought, fixed, first, ticks):
        calls.append(ticks)
        return compiled(head, thought, fixed, first, ticks)

    monkeypatch.setattr(head_karla, "compiled_ticks", counted)
    threads = torch.get_num_threads()
    results = list(tick_results(karla, make_backbone(), past=5, rounds=2))
    assert [result.name for result in results] == ["ticks_share_torch", "ticks_share_c"]
    assert all(result.value > 0 and result.peer_value > 0 and result.unit == "ms" for result in results)
    assert results[0].peer_value == results[1].peer_value
    assert calls == [OPTIONS["ctm_num_ticks"]] * 2  # one side alone asks the kernel, for all ticks at once
    assert torch.get_num_threads() == threads
    assert head_karla.compiled_ticks is counted
