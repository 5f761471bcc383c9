"""Two processes train one Karla over a 4-bit backbone with DistributedDataParallel (gloo, on the CPU)."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import OPTIONS, save_backbone


ROWS = {"engram_layer_ids": [1], "engram_layer_head_dim": 4, "engram_layer_rows_per_head": 100}
WORKER = """
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from karla_hf import KarlaForCausalLM, load_tokenizer
from karla_hf.optimizer import RowsAdamW

torch.set_num_threads(1)
dist.init_process_group("gloo")
folder, options = sys.argv[1], torch.load(f"{sys.argv[1]}/options.pt")
rank = dist.get_rank()
torch.manual_seed(rank)  # heads that differ until DDP begins
tokenizer = load_tokenizer(f"{folder}/backbone")
model = KarlaForCausalLM.from_backbone(f"{folder}/backbone", tokenizer, quantization="nf4", **options)
speaking = [*(layer.weight for layer in model.model.ctm.zero_initialised)]
if model.model.layer_engram is not None:
    speaking += [gate.value.weight for gate in model.model.layer_engram.gates]
for weight in speaking:
    torch.nn.init.normal_(weight, std=0.1)
model.read("The harbour master is Orla Venn." if rank else "The ferry leaves at nine.", tokenizer, progress=False)
pack = model.engram.packs["default"]
def content():
    return torch.cat([torch.from_numpy(part).flatten().double() for level in pack.levels for part in level.items()])
seen = {"pack": content(), "own": {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}}
wrapped = DistributedDataParallel(model)
seen["begin"] = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
model.train()
ids = torch.randint(1, 300, (2, 11), generator=torch.Generator().manual_seed(100 + rank))
def gradients():
    found = {n: p.grad.to_dense().clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found
model(ids, labels=ids).loss.backward()
seen["alone"] = gradients()
wrapped(ids, labels=ids).loss.backward()
seen["together"] = gradients()
rows = {n for n in seen["own"] if n.endswith("layer_engram.rows.weight")}
groups = [{"params": [p for n, p in model.named_parameters() if (n in rows) == sparse and p.requires_grad],
           "sparse": sparse} for sparse in (False, True)]
optimizer = RowsAdamW([group for group in groups if group["params"]], lr=1e-2)
for _ in range(3):
    optimizer.zero_grad()
    wrapped(ids, labels=ids).loss.backward()
    optimizer.step()
seen["end"] = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
seen["frozen"] = all(torch.equal(frozen[n], p) for n, p in model.named_parameters() if not p.requires_grad)
seen["pack after"] = content()
torch.save(seen, f"{folder}/rank{rank}.pt")
dist.destroy_process_group()
"""


@pytest.fixture(
    scope="module",
    params=[pytest.param({}, id="head"), pytest.param(ROWS, id="head and rows", marks=pytest.mark.slow)],
)
def ranks(request, tmp_path_factory):
    """What the two processes saw."""
    folder = tmp_path_factory.mktemp("ddp")
    save_backbone(folder / "backbone", intermediate_size=128)  # 4-bit blocks are 64 wide
    torch.save({**OPTIONS, **request.param}, folder / "options.pt")
    (folder / "worker.py").write_text(WORKER)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, str(folder / "worker.py"), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def test_gradients_are_averaged(ranks):
    for name, together in ranks[0]["together"].items():
        mean = (ranks[0]["alone"][name] + ranks[1]["alone"][name]) / 2
        torch.testing.assert_close(together, mean, rtol=1e-4, atol=1e-6 + 1e-4 * mean.abs().max().item(), msg=name)
        assert torch.equal(together, ranks[1]["together"][name]), name


def test_both_processes_end_with_the_same_weights(ranks):
    first, second = ranks
    assert any(not torch.equal(first["own"][name], second["own"][name]) for name in first["own"])
    assert all(torch.equal(first["begin"][name], second["begin"][name]) for name in first["own"])
    for name, weight in first["end"].items():
        assert torch.equal(weight, second["end"][name]), name
        assert not torch.equal(weight, first["begin"][name]), name


def test_memory_and_backbone_are_not_touched(ranks):
    """What each process has read stays its own; it is no parameter and no buffer."""
    for seen in ranks:
        assert torch.equal(seen["pack"], seen["pack after"])
        assert seen["pack"].any()
        assert seen["frozen"]
    assert not torch.equal(ranks[0]["pack"], ranks[1]["pack"])
