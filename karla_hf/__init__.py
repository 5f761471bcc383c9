"""karla-hf: a frozen language model with a memory that learns by reading and a head that thinks."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from karla_hf import kernel
from karla_hf.backbones import load_backbone, load_tokenizer
from karla_hf.card import render_card
from karla_hf.modeling.configuration_ctm import CtmConfig
from karla_hf.modeling.configuration_hope import HopeConfig
from karla_hf.modeling.configuration_karla import KarlaConfig
from karla_hf.modeling.modeling_ctm import CtmModel
from karla_hf.modeling.modeling_hope import HopeForCausalLM, HopeModel
from karla_hf.modeling.modeling_karla import KarlaForCausalLM, KarlaModel
from karla_hf.modeling.pretrained_karla import KarlaPreTrainedModel
from karla_hf.modeling.reading_karla import ReadReport


__version__ = "0.1.0"

__all__ = [
    "CtmConfig",
    "CtmModel",
    "HopeConfig",
    "HopeForCausalLM",
    "HopeModel",
    "KarlaConfig",
    "KarlaForCausalLM",
    "KarlaModel",
    "ReadReport",
    "load_backbone",
    "load_tokenizer",
]

AutoConfig.register("karla", KarlaConfig, exist_ok=True)
AutoModel.register(KarlaConfig, KarlaModel, exist_ok=True)
AutoModelForCausalLM.register(KarlaConfig, KarlaForCausalLM, exist_ok=True)
AutoConfig.register("ctm", CtmConfig, exist_ok=True)
AutoModel.register(CtmConfig, CtmModel, exist_ok=True)
AutoConfig.register("hope", HopeConfig, exist_ok=True)
AutoModel.register(HopeConfig, HopeModel, exist_ok=True)
AutoModelForCausalLM.register(HopeConfig, HopeForCausalLM, exist_ok=True)
kernel.register()
KarlaPreTrainedModel.make_card = staticmethod(render_card)
