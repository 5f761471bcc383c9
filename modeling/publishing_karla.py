"""Publishing a Karla: one commit that holds what its checkpoint calls for, and nothing else."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import CommitInfo, HfApi, ModelCardData, ModelInfo, get_token
from transformers.utils import logging

from .bitlinear_karla import BitLinear, set_packed
from .hub_karla import commit_files, file_names, hub_errors, open_repository
from .manifest_karla import FOLDER, MANIFEST
from .public_karla import (
    CARD,
    RENEWED,
    check_public,
    keeps_card,
    public_backbone,
    public_memory,
    published_files,
    stale_files,
)
from .saving_karla import save_folder
from .sharded_karla import collect
from .ternary_karla import CODES_PER_BYTE


logger = logging.get_logger(__name__)


def plain_card(folder: Path, repo_id: str, tags: Sequence[str] = ()) -> str:
    """The model card of a checkpoint: what the Hub files it under, and how to load it."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return (
        f"---\n{card_data(config, tags).to_yaml()}\n---\n\n# {repo_id.rpartition('/')[2]}\n\nA Karla: a memory that "
        "learns by reading, and a head that thinks, on a frozen language model. It is loaded with "
        f'`AutoModelForCausalLM.from_pretrained("{repo_id}", trust_remote_code=True)`.\n\n{RENEWED}\n'
    )


class KarlaPublishingMixin:
    """`push_to_hub` of the Karla models."""

    # makes a card of (folder, repo_id, tags); karla_hf sets one that fills its template
    make_card: ClassVar[Callable[..., str]] = staticmethod(plain_card)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
        tags: str | list[str] | None = None,
        include_backbone: bool = False,
        packs: Sequence[str] | None = None,
        base_model: str | None = None,
    ) -> CommitInfo | None:
        """Push memory, packed head, code and card in one commit; the tokenizer has a `push_to_hub` of its own.

        The model is not modified. A push that dies leaves the branch as it was, and one that another has overtaken is
        refused. A card that the repository has stays.

        Args:
            repo_id: `owner/name`, or a name of the token's owner; made if new.
            commit_message, commit_description, private, token, revision, create_pr, tags: as in transformers.
            max_shard_size: size from which weights are split, such as `"5GB"`.
            include_backbone: whether to push the backbone's weights too.
            packs: packs to push; None pushes all. What the repository holds of others is deleted.
            base_model: the backbone's name on the Hub, where this model knows it by a folder.

        Returns:
            The commit; None on all processes but the first.

        Raises:
            ValueError: if the backbone has no name on the Hub, or something that would be pushed names a local path.
            KeyError: if there is no such pack.
            OSError: if a pack is damaged, the Hub refuses, or another push came first. Nothing is pushed then.
        """
        with tempfile.TemporaryDirectory(prefix="karla-push-") as name:
            folder = Path(name)
            if not self.save_public(
                folder, include_backbone=include_backbone, packs=packs, base_model=base_model,
                max_shard_size=max_shard_size,
            ):  # fmt: skip
                return None
            extra = [*(getattr(self, "model_tags", None) or ()), *([tags] if isinstance(tags, str) else tags or ())]

            def write_card(found: str) -> None:
                (folder / CARD).write_text(self.make_card(folder, found, extra), encoding="utf-8")

            return publish(
                folder, repo_id, write_card, token=token, private=private,
                revision=revision, create_pr=create_pr, message=commit_message, description=commit_description,
            )  # fmt: skip

    def save_public(
        self,
        folder: Path,
        *,
        include_backbone: bool = False,
        packs: Sequence[str] | None = None,
        base_model: str | None = None,
        max_shard_size: int | str = "50GB",
    ) -> bool:
        """Write a checkpoint as it is to be pushed to an empty folder; arguments and errors as in `push_to_hub`.

        Returns:
            Whether this process wrote: of a distributed memory, only the first does.
        """
        backbone = public_backbone(self.config.base_model_name_or_path, base_model, include_backbone)
        renamed = backbone != self.config.base_model_name_or_path
        if include_backbone:
            self._check_exact_backbone()
        self._describe_backbone()
        engram = collect(self.engram)
        if engram is None:
            return False
        memory = public_memory(engram, list(engram.packs) if packs is None else packs, backbone)
        state = self._own_state(None, include_backbone) or self.state_dict()
        state, packed = self._with_packed_head(state)
        changes = {"ctm_packed": packed, "base_model_name_or_path": backbone}
        if renamed:
            changes |= {"base_model_revision": None}
        self._save_weights(folder, include_backbone, state, changes, max_shard_size=max_shard_size)
        save_folder(memory, folder / FOLDER, self.tokenizer_sha256, remember=False)
        return True

    def _with_packed_head(self, state: dict) -> tuple[dict, bool]:
        """The weights with the head's packed, and whether it could be."""
        head = self.karla_model.ctm
        layers = [layer for layer in head.modules() if isinstance(layer, BitLinear)]
        if any(layer.out_features % CODES_PER_BYTE for layer in layers):
            logger.warning("The head has layers that cannot be packed, so it is pushed in floats.")
            return state, False
        head = copy.deepcopy(head)
        set_packed(head, True)
        rest = {name: tensor for name, tensor in state.items() if not name.startswith(self.head_prefix)}
        return rest | head.state_dict(prefix=self.head_prefix), True


def card_data(config: dict, tags: Sequence[str] = (), **more: Any) -> ModelCardData:
    """Metadata of a card.

    Args:
        config: of the checkpoint.
        tags: tags beside our own.
        more: fields of `ModelCardData` to add or to replace.

    Example:
        >>> card_data({"base_model_name_or_path": "owner/backbone"}).pipeline_tag
        'text-generation'
    """
    base_model = config.get("base_model_name_or_path")
    fields = {"base_model": base_model} | ({"base_model_relation": "adapter"} if base_model else {})
    fields |= {"library_name": "transformers", "pipeline_tag": "text-generation", "license": "apache-2.0"}
    return ModelCardData(tags=["karla", "engram", "bitnet", "custom_code", *tags], **(fields | more))


def publish(
    folder: Path,
    repo_id: str,
    write_card: Callable[[str], None],
    *,
    fresh_card: bool = False,
    token: bool | str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    description: str | None = None,
) -> CommitInfo:
    """Push the files of a checkpoint's folder in one commit, with those deleted that no longer belong to it.

    Args:
        folder: what `save_public` wrote.
        repo_id: the repository.
        write_card: writes a card into the folder, given the repository's full name.
        fresh_card: whether it is called even if folder or repository have a card to keep.
        token, private, revision, create_pr: as in `push_to_hub`.
        message, description: of the commit.
    """
    api = HfApi(token=token, library_name="karla-hf")
    secret = token if isinstance(token, str) else get_token()
    check_public(folder, published_files(folder), secret)
    with hub_errors(repo_id, "nothing was pushed", write=True, revision=revision):
        head = open_repository(api, repo_id, private=private, revision=revision, create_pr=create_pr)
        there = file_names(head)
        if MANIFEST in there:
            raise ValueError(f"{head.id} holds a pack of a memory, not a model; give another repository.")
        if fresh_card or not (keeps_card(folder) or keeps_remote_card(api, head)):
            write_card(head.id)
        names = published_files(folder)
        check_public(folder, names, secret)
        return commit_files(
            api, head, folder, names, stale_files(there, names), message=message or "Upload Karla", description=description,
            revision=revision, create_pr=create_pr,
        )  # fmt: skip


def keeps_remote_card(api: HfApi, head: ModelInfo) -> bool:
    """Whether a repository has a card that is not to be made anew."""
    if CARD not in file_names(head):
        return False
    path = api.hf_hub_download(head.id, CARD, revision=head.sha)
    return keeps_card(Path(path).parent)
