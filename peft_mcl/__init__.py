"""LoRA-MCL for PEFT: K LoRA hypotheses on one frozen model.

Importing this package registers the PEFT type ``MCLORA``, so that `peft.get_peft_model`, `peft.PeftModel` and
`peft.AutoPeftModelForCausalLM` know it. Method: Letzelter, Malard et al., "Multiple Choice Learning of Low-Rank Adapters
for Language Modeling" (arXiv 2507.10419).
"""

from peft_mcl.card import CardFigures, TrainingFacts, create_model_card, write_model_card
from peft_mcl.config import MCLoraConfig
from peft_mcl.convert import export_hypotheses, from_lora_adapters, split_lora_adapter
from peft_mcl.model import MCLoraModel
from peft_mcl.ranking import Ranking, consensus_order, rank_sequences
from peft_mcl.registration import register
from peft_mcl.serving import check_serving
from peft_mcl.version import __version__


__all__ = [
    "CardFigures",
    "MCLoraConfig",
    "MCLoraModel",
    "Ranking",
    "TrainingFacts",
    "__version__",
    "check_serving",
    "consensus_order",
    "create_model_card",
    "export_hypotheses",
    "from_lora_adapters",
    "rank_sequences",
    "split_lora_adapter",
    "write_model_card",
]

register(MCLoraConfig, MCLoraModel)
