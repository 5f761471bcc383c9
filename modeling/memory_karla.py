"""Reading and forgetting: the methods by which a Karla learns without being trained."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable, Sequence

import torch
from torch import distributed

from .answers_karla import AnswerWriter
from .engram_karla import Engram
from .exchange_karla import export_pack, find_pack, import_pack, merge_packs
from .manifest_karla import check_pack_name
from .ranks_karla import Ranks
from .reading_karla import ReadReport, read_texts
from .saving_karla import check_undamaged
from .sharded_karla import ShardedEngram, collect, shard


WINDOWS = {"closed": (64, 48, 8), "open": (512, 256, None)}  # most tokens, stride, least tokens of a sentence
BATCH_TOKENS = {"cpu": 256}  # of one call of the backbone while reading; 4,096 on any other device


def tokenizer_hash(tokenizer) -> str:
    """SHA-256 of a tokenizer's vocabulary: every token with its id.

    Args:
        tokenizer: a transformers tokenizer.

    Returns:
        64 hexadecimal digits.
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256("\n".join(f"{i} {token!r}" for token, i in vocabulary).encode()).hexdigest()


class KarlaMemoryMixin:
    """`read`, `forget`, what else is done with packs, the memory's switch and its processes, for `KarlaForCausalLM`."""

    @torch.no_grad()
    def read(
        self,
        texts: str | Iterable[str],
        tokenizer,
        *,
        pack: str = "default",
        context: str = "closed",
        sign: int = 1,
        title: str | Sequence[str] | None = None,
        progress: bool = True,
    ) -> ReadReport:
        """Read texts once and write what was surprising into a pack. The backbone and the head are not modified.

        Args:
            texts: one text or several; each is a document of its own. Nothing is read when one of them is refused.
            tokenizer: the tokenizer that the memory was made with.
            pack: name of the pack; made if new, written on if it exists.
            context: what the backbone sees while reading. `"closed"`: each sentence alone, so that whatever it would not
                know without the text is stored. `"open"`: windows of 512 tokens, which stores only what surprises in
                context.
            sign: 1 to learn the texts; -1 to unlearn them, which makes them unlikely wherever their words stand in this
                order.
            title: what the pack shall name as its sources, such as the names of files; one or several, or None.
            progress: whether to show a progress bar.

        Returns:
            The report.

        Raises:
            ValueError: for an unknown context or sign, a name that no pack can have, no text, a text of fewer than two tokens,
                another tokenizer, or texts that differ between the processes of a distributed memory.
            OSError: if files of the pack are damaged.
        """
        check_pack_name(pack)
        check_undamaged(self.engram, pack)
        if sign not in (1, -1):
            raise ValueError(f"sign is {sign!r}; give 1 to learn the texts or -1 to unlearn them.")
        if context not in WINDOWS:
            raise ValueError(f"context is {context!r}; give one of {sorted(WINDOWS)}.")
        self._check_tokenizer(tokenizer)
        encoded = self._encode([texts] if isinstance(texts, str) else list(texts), tokenizer)
        window, stride, least = WINDOWS[context]
        was_training, target = self.training, self.engram.open_pack(pack)
        self.eval()
        try:
            weight, bias = self.model.output_projection()
            report = read_texts(
                encoded,
                self.engram,
                target,
                self._closed_states,
                weight,
                bias,
                window=window,
                stride=stride,
                least=least,
                batch_tokens=BATCH_TOKENS.get(self.device.type, 4096),
                sign=sign,
                after_text=self._answer_writer(encoded, weight, target, sign),
                progress=progress,
            )
        finally:
            self.train(was_training)
        if sign > 0 and title is not None:
            titles = [title] if isinstance(title, str) else title
            target.sources += [title for title in titles if title not in target.sources]
        return report

    def forget(self, pack: str) -> None:
        """Remove a pack; what the other packs hold is untouched.

        Raises:
            KeyError: if there is no such pack.
        """
        find_pack(self.engram, pack)
        del self.engram.packs[pack]

    def export_pack(self, name: str, folder: str | os.PathLike) -> None:
        """Write one pack to a folder of its own, from which `import_pack` adds it to another memory.

        Args:
            name: the pack.
            folder: new or empty.

        Raises:
            KeyError: if there is no such pack.
            OSError: if the folder holds something or cannot be written, or the pack is damaged.
        """
        self._describe_backbone()
        find_pack(self.engram, name)
        engram = self.collect_memory()
        if engram is not None:
            export_pack(engram, name, folder, self.tokenizer_sha256)

    def import_pack(self, folder: str | os.PathLike, name: str | None = None) -> str:
        """Add a pack that was exported; returns its name.

        Args:
            folder: what `export_pack` wrote.
            name: name for the pack here; None keeps its own.

        Raises:
            ValueError: if the pack was made with another tokenizer, backbone, seed, layout or schema, or a pack of that
                name is here already.
            OSError: if the folder holds no pack, or a file is damaged.
        """
        self._describe_backbone()
        name = import_pack(self.engram, folder, name, self.tokenizer_sha256)
        if isinstance(self.engram, ShardedEngram):
            self.engram.take_pack(name, self.engram.packs[name])
        return name

    def merge_packs(self, names: Sequence[str], into: str) -> None:
        """Replace packs by one whose rows are their sums, the same in whatever order they are named.

        Args:
            names: the packs.
            into: name of the result; one of them, or new.

        Raises:
            KeyError: if there is no such pack.
            ValueError: if `into` cannot be a name or is that of another pack.
        """
        merge_packs(self.engram, names, into)

    def packs(self) -> dict[str, int]:
        """Rows that each pack owns (of a sharded memory, here), by name, in the order in which the packs were made."""
        return {name: pack.num_owned for name, pack in self.engram.packs.items()}

    def use_memory(self, enabled: bool) -> None:
        """Switch the memory on or off; off, the logits are those of backbone and head alone."""
        self.engram.enabled = enabled

    def distribute(self, mode: str = "replicated", group=None) -> None:
        """Read with all processes that `torchrun` or `accelerate launch` started; every process calls this.

        From here on every process calls what changes or saves the memory, with the same arguments. `read` divides the work of the
        backbone; what it writes is what one process would write. A memory that replaces this one is not distributed.

        Args:
            mode: `"replicated"`: every process holds all rows, mapped from the same files where they were loaded; for one
                machine. `"sharded"`: process `name mod world` holds a row; for several machines. Then also
                `forward`, `generate` (with `synced_gpus=True`) and saving are collectives, which all processes call in
                step.
            group: processes that read together, with a backend for CPU tensors; None for a new gloo group of all.

        Raises:
            ValueError: for an unknown mode, without a process group, or if the memory is sharded already.
            OSError: if files of a pack that is to be sharded are damaged.
        """
        if mode not in ("replicated", "sharded"):
            raise ValueError(f"mode is {mode!r}; give 'replicated' (one machine) or 'sharded' (several machines).")
        if not (distributed.is_available() and distributed.is_initialized()):
            raise ValueError(
                "There is no process group to distribute to; start with torchrun or accelerate launch, and call "
                "torch.distributed.init_process_group() or make an Accelerator first."
            )
        if isinstance(self.engram, ShardedEngram):
            raise ValueError("The memory is sharded already; load it again to distribute it in another way.")
        ranks = Ranks(distributed.new_group(backend="gloo") if group is None else group)
        ranks.check_same({name: (pack.clock.step, pack.count()) for name, pack in self.engram.packs.items()})
        if mode == "sharded":
            for name in self.engram.packs:
                check_undamaged(self.engram, name)
            self.set_engram(shard(self.engram, ranks), self.tokenizer_sha256)
        else:
            self.engram.ranks = ranks

    def collect_memory(self) -> Engram | None:
        """The whole memory on process 0, which saves it, and None on the others; alone, the memory itself.

        Where rows are sharded this is a collective, and process 0 must have room for all of them.
        """
        return collect(self.engram)

    def _answer_writer(self, encoded, weight, pack, sign):
        """What is to be called after each text, with its number, to store it under the words around its answers."""
        if self.engram.lexicon is None:
            return None
        texts = [ids.tolist() for ids in encoded]
        writer = AnswerWriter(self.engram.lexicon, texts, weight, self.engram.layout.width, sign)
        return functools.partial(writer.write, pack)

    def _closed_states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        device = self.get_input_embeddings().weight.device
        with self.model.trained_rows(input_ids, attention_mask, None, 0):
            out = self.model.backbone(
                input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), use_cache=False
            )
        return out.last_hidden_state

    def _check_tokenizer(self, tokenizer) -> None:
        expected = self.tokenizer_sha256
        if expected is not None and tokenizer_hash(tokenizer) != expected:
            raise ValueError(
                f"The tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has another vocabulary than the one that this "
                "memory was made with; use the tokenizer of the backbone."
            )

    def _encode(self, texts: list[str], tokenizer) -> list[torch.Tensor]:
        if not texts:
            raise ValueError("There is no text to read; give at least one.")
        encoded = [torch.tensor(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
        for number, (text, ids) in enumerate(zip(texts, encoded, strict=True)):
            if len(ids) < 2:
                raise ValueError(f"Text {number} ({text[:40]!r}) has {len(ids)} tokens; reading needs 2 or more.")
        return encoded
