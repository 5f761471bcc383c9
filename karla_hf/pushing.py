"""What a trainer pushes: a Karla as `push_to_hub` of the model pushes it, and no pickle."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils.hub import PushInProgress, hf_api

from karla_hf.card import card_text
from karla_hf.checkpoints import save_tokenizer
from karla_hf.modeling.modeling_karla import KarlaForCausalLM
from karla_hf.modeling.public_karla import CARD, is_hub_name, public_backbone
from karla_hf.modeling.publishing_karla import publish


if TYPE_CHECKING:
    from trl import SFTTrainer as Base
else:
    Base = object


class PublishingTrainerMixin(Base):
    """Pushes of a trainer of a Karla: one commit each, of what belongs to the model, with our card.

    The commit holds no `training_args.bin` and nothing else that happens to lie in `output_dir`. A Karla behind a PEFT
    adapter is pushed as the trainer does by itself, which is the adapter's files.
    """

    hub_model_id: str | None  # type: ignore[assignment]  # transformers' own code says None alone
    push_in_progress: PushInProgress | None  # type: ignore[assignment]

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository, after a look at whether the model may be pushed at all.

        Raises:
            ValueError: if the backbone has no name on the Hub, or `hub_strategy` asks for optimiser states, which are
                pickles.
        """
        strategy = self.args.hub_strategy
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ValueError(
                f"`hub_strategy` is {HubStrategy(strategy).value!r}, which pushes the optimiser's state as a pickle; give "
                "'every_save' or 'end'."
            )
        if (karla := self._karla()) is not None:
            public_backbone(karla.config.base_model_name_or_path, None, include_backbone=False)
        super().init_hf_repo(token=token, private=private)

    def create_model_card(  # type: ignore[override]  # as TRL's
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write our model card into `output_dir`; arguments as in TRL."""
        karla = self._karla()
        if karla is None:
            super().create_model_card(model_name=model_name, dataset_name=dataset_name, tags=tags)
        elif self.is_world_process_zero():
            output = Path(str(self.args.output_dir))
            output.mkdir(parents=True, exist_ok=True)
            repo_id = self.hub_model_id or self.args.hub_model_id or model_name or output.name
            (output / CARD).write_text(self._card(karla, repo_id, dataset_name, tags), encoding="utf-8")

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save, and push the model, its tokenizer and our card in one commit; arguments as in transformers."""
        karla = self._karla()
        if karla is None:
            return super().push_to_hub(commit_message, blocking, token, revision, private, **kwargs)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        self.create_model_card(kwargs.pop("model_name", None), **kwargs)
        card = Path(str(self.args.output_dir), CARD).read_text(encoding="utf-8")
        return self._publish(karla, commit_message, token, revision, card, blocking=blocking)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        karla = self._karla()
        if karla is None:
            super()._push_from_checkpoint(checkpoint_folder)
            return
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        by_step = self.args.save_strategy == SaveStrategy.STEPS
        at = f"step {self.state.global_step}" if by_step else f"epoch {int(self.state.epoch or 0)}"
        card = self._card(karla, str(self.hub_model_id), None, None)
        job = self._publish(karla, f"Training in progress, {at}", None, None, card, blocking=False)
        if busy:
            cast("Any", self.push_in_progress).jobs.append(job)
        else:
            self.push_in_progress = PushInProgress(cast("Any", [job]))

    def _publish(
        self, karla: KarlaForCausalLM, message: str | None, token: str | None, revision: str | None, card: str, *,
        blocking: bool,
    ) -> Any:  # fmt: skip
        """Write what is pushed now, for the model may train on, and push it, perhaps later."""
        staging = tempfile.TemporaryDirectory(prefix="karla-push-")
        folder = Path(staging.name)
        karla.save_public(folder)
        if self.processing_class is not None:
            save_tokenizer(cast("PreTrainedTokenizerBase", self.processing_class), folder)

        def write_card(repo_id: str) -> None:
            (folder / CARD).write_text(card, encoding="utf-8")

        def push() -> Any:
            with staging:
                return publish(
                    folder, str(self.hub_model_id), write_card, fresh_card=True, token=token or self.args.hub_token,
                    revision=revision or self.args.hub_revision, message=message,
                )  # fmt: skip

        return push() if blocking else hf_api().run_as_future(push)

    def _karla(self) -> KarlaForCausalLM | None:
        """The model without what trainers wrap around it; None if it is not a Karla itself."""
        model = self.accelerator.unwrap_model(self.model)
        return model if isinstance(model, KarlaForCausalLM) else None

    def _card(self, karla: KarlaForCausalLM, repo_id: str, dataset: str | None, tags: str | list[str] | None) -> str:
        own = [*getattr(self, "_tag_names", []), *(karla.model_tags or ())]  # TRL's
        tags = [*own, *([tags] if isinstance(tags, str) else tags or ())]
        keys = ("base_model_name_or_path", "backbone_included", "ctm_num_ticks")
        config = {key: getattr(karla.config, key) for key in keys}
        datasets = [dataset] if dataset is not None and is_hub_name(dataset) else []
        return card_text(config, repo_id, tags, datasets=datasets)
