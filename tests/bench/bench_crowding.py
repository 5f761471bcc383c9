"""Recall of 200 facts, and what unread text suffers, as a table fills up: of fixed size, and allowed to grow."""

from matplotlib.figure import Figure

from karla_hf import KarlaForCausalLM, load_backbone, load_tokenizer
from karla_hf.documents import python_reference, unrelated_text
from karla_hf.evaluation import exact_recall, perplexity
from karla_hf.facts import make_facts


NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
LOADS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
GROWING = (1.0, 4.0)


def run():
    """One row for each load (names written over the rows of the table), the roomy table first."""
    tokenizer, backbone = load_tokenizer(NAME), load_backbone(NAME)
    facts = make_facts(200, split="test")
    unread = {"story": unrelated_text(), "reference": python_reference()["with"]}

    def measure(**options):
        model = KarlaForCausalLM.from_backbone(backbone, tokenizer, engram_update_periods=[1], **options)
        before = {name: perplexity(model, tokenizer, text) for name, text in unread.items()}
        report = model.read([fact.text for fact in facts], tokenizer)
        changes = {
            name: 100 * perplexity(model, tokenizer, text) / before[name] - 100 for name, text in unread.items()
        }
        row = {
            "rows": model.engram.packs["default"].levels[-1].num_rows,
            "names kept": model.engram.packs["default"].num_owned,
            "names lost": report.rows_lost,
            "recalled of 200": exact_recall(model, tokenizer, facts).exact,
            "unread story, % perplexity": changes["story"],
            "unread reference, % perplexity": changes["reference"],
        }
        return row, len(model.engram.families)

    roomy, families = measure()
    names = roomy["names kept"]
    rows = {"roomy": {"load": names / roomy["rows"], **roomy}}
    for load in LOADS:
        wanted = max(8, round(names / load))
        rows[f"fixed, {load}"] = {"load": load, **measure(engram_max_rows=wanted)[0]}
    for load in GROWING:
        per_family = max(1, round(names / load / families))
        rows[f"grows from {load}"] = {"load": load, **measure(engram_rows_per_head=per_family)[0]}
    return {"rows": rows}


def draw(result, path):
    """Recall and change of perplexity over load."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    recall, change = figure.subplots(1, 2)
    for kind, label, colour in (("fixed", "fixed table", "#1f6f78"), ("grows", "growing table", "#d9822b")):
        points = [row for name, row in result["rows"].items() if name.startswith(kind)]
        loads = [row["load"] for row in points]
        recall.plot(loads, [row["recalled of 200"] for row in points], "o-", label=label, color=colour)
        for text, style in (("story", "o-"), ("reference", "s--")):
            label = f"{text}, {kind} table"
            change.plot(
                loads, [row[f"unread {text}, % perplexity"] for row in points], style, label=label, color=colour
            )
    recall.set_ylim(0, 210)
    recall.set_title("facts recalled, of 200")
    change.axhline(0.2, color="#9aa5b1", linewidth=1)
    change.set_title("perplexity of unread text, % change")
    for axes in (recall, change):
        axes.set_xscale("log")
        axes.set_xlabel("names written / rows of the first table")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
