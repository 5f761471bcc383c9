import pytest
from tiny import OPTIONS, make_backbone, make_tokenizer, save_backbone, save_karla

from karla_hf import KarlaForCausalLM
from karla_hf.checkpoints import create_checkpoint, load_checkpoint
from karla_hf.info import BUDGET, describe_levels, describe_packs


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_backbone(tmp_path_factory.mktemp("info") / "backbone")


@pytest.fixture(scope="module")
def checkpoint(backbone):
    return save_karla(backbone.parent / "karla", backbone)


def weight_bytes(*folders) -> int:
    return sum(path.stat().st_size for folder in folders for path in folder.glob("*.safetensors"))


def test_levels_are_measured(backbone, checkpoint):
    model, tokenizer = load_checkpoint(checkpoint)
    model.read("The ferry leaves at seven. " * 5, tokenizer, title="ferry", progress=False)
    model.save_memory(checkpoint)
    l0, l1, l2, total = describe_levels(model, checkpoint)

    numbers = sum(parameter.numel() for parameter in make_backbone().parameters())  # tied weights count once
    assert (l0.name, l0.parameters, l0.trainable, l0.update_period) == ("L0", numbers, 0, "never")
    assert l0.bytes_on_disk == weight_bytes(backbone)
    assert 4 * numbers <= l0.bytes_in_ram < 4 * numbers + 1000  # and the rotary frequencies

    tables = [table for level in model.engram.packs["default"].levels for table in level.tables]
    rows = sum(table.rows.size for table in tables)
    stored = sum(path.stat().st_size for path in (checkpoint / "engram").iterdir())
    assert (l1.name, l1.parameters, l1.trainable) == ("L1", rows, 0)
    assert l1.bytes_on_disk == stored
    slots = sum(len(table) for table in tables)
    assert 0 < l1.bytes_in_ram - 2 * rows - 9 * slots < 10_000  # the constants
    assert l1.update_period == "every 64, 512 and 4096 tokens read"

    head = sum(parameter.numel() for parameter in model.model.ctm.parameters())
    assert (l2.name, l2.parameters, l2.trainable, l2.update_period) == ("L2", head, head, "every training step")
    assert l2.bytes_on_disk == l2.bytes_in_ram
    assert 0 < weight_bytes(checkpoint) - l2.bytes_on_disk < 10_000  # the file's header

    assert (total.parameters, total.trainable) == (numbers + rows + head, head)
    assert total.bytes_on_disk == l0.bytes_on_disk + l1.bytes_on_disk + l2.bytes_on_disk
    assert total.bytes_in_ram == l0.bytes_in_ram + l1.bytes_in_ram + l2.bytes_in_ram
    assert [level.budget for level in (l0, l1, l2, total)] == [BUDGET["L0"], None, BUDGET["L2"], BUDGET["total"]]

    (pack,) = describe_packs(model.engram, checkpoint)
    assert (pack.name, pack.rows) == ("default", model.packs()["default"])
    assert pack.load == pack.rows / len(tables[-1])
    files = (checkpoint / "engram").glob("default-*.safetensors")
    assert pack.bytes_on_disk == sum(file.stat().st_size for file in files)
    assert (pack.sources, pack.tokens, pack.damaged) == (["ferry"], model.engram.packs["default"].tokens, {})


def test_a_pack_that_was_not_saved_has_no_file(backbone, tmp_path):
    model, tokenizer = load_checkpoint(save_karla(tmp_path / "karla", backbone))
    assert describe_packs(model.engram, tmp_path / "karla") == []
    model.read("The ferry leaves at seven.", tokenizer, pack="new", progress=False)
    (pack,) = describe_packs(model.engram, tmp_path / "karla")
    assert (pack.name, pack.bytes_on_disk) == ("new", None)


def test_a_packed_head_holds_the_same_numbers_in_fewer_bytes(backbone, tmp_path):
    model, _ = load_checkpoint(save_karla(tmp_path / "karla", backbone))
    *_, loose, _ = describe_levels(model, tmp_path / "karla")
    model.pack().save_pretrained(tmp_path / "karla")
    *_, packed, _ = describe_levels(model, tmp_path / "karla")
    assert packed.parameters == loose.parameters
    assert packed.bytes_on_disk == packed.bytes_in_ram < loose.bytes_in_ram / 2
    assert packed.trainable < loose.trainable


@pytest.mark.parametrize(("quantization", "bits"), [("nf4", 4), ("int8", 8)])
def test_a_quantised_backbone_counts_the_weights_it_stands_for(tmp_path, quantization, bits):
    sizes = {"intermediate_size": 128}  # bitsandbytes takes multiples of its block of 64
    backbone = save_backbone(tmp_path / "backbone", **sizes)
    model = create_checkpoint(str(backbone), tmp_path / "karla", quantization=quantization, options=OPTIONS)
    plain = make_backbone(**sizes)
    linears = sum(p.numel() for layer in plain.model.layers for n, p in layer.named_parameters() if "norm" not in n)
    others = sum(p.numel() for p in plain.parameters()) - linears
    l0 = describe_levels(model, tmp_path / "karla")[0]
    assert l0.parameters == linears + others
    unquantised = others * model.get_input_embeddings().weight.element_size()
    constants = l0.bytes_in_ram - unquantised - linears * bits // 8
    assert 0 < constants < linears  # scales and tables beside the weights; much at this size
    assert l0.bytes_on_disk == weight_bytes(backbone)


def test_an_included_backbone_lies_in_the_checkpoint(tmp_path):
    tokenizer = make_tokenizer()
    model = KarlaForCausalLM.from_backbone(make_backbone(), tokenizer, **OPTIONS)
    model.save_pretrained(tmp_path, include_backbone=True)
    l0, _, l2, _ = describe_levels(model, tmp_path)
    assert l0.bytes_on_disk == 4 * l0.parameters
    assert 0 < weight_bytes(tmp_path) - l0.bytes_on_disk - l2.bytes_on_disk < 10_000


def test_trained_rows_are_a_level_of_their_own(backbone, tmp_path):
    options = {"engram_layer_ids": [0], "engram_layer_head_dim": 4, "engram_layer_rows_per_head": 50}
    save_karla(tmp_path / "karla", backbone, **options)
    model = KarlaForCausalLM.from_pretrained(tmp_path / "karla")
    _, _, rows, l2, total = describe_levels(model, tmp_path / "karla")
    own = sum(parameter.numel() for parameter in model.model.layer_engram.parameters())
    assert (rows.name, rows.what, rows.parameters, rows.trainable) == ("L1", "trained rows", own, own)
    state = model.model.layer_engram.state_dict()
    assert rows.bytes_on_disk == rows.bytes_in_ram == sum(tensor.nbytes for tensor in state.values())
    assert l2.bytes_on_disk == sum(tensor.nbytes for tensor in model.model.ctm.state_dict().values())
    assert total.trainable == own + l2.trainable
