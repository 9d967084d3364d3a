"""What a training script calls, under one name. The loop itself is in each script: finetune/lora.py is the one to read.

distribution (Fabric, DDP, FSDP), precision, memory, loop, log, resuming, saving, rehearsal know nothing of texts;
feed, finetuning and linearizing read examples; pretraining reads blocks of tokens.
"""

from lit_swa.formats.checkpoint import load_config
from lit_swa.training.blocks import read_features
from lit_swa.training.blockwise import (
    check_arguments,
    evaluate_block,
    load_block_student,
    prepare_block,
    save_block,
    save_inputs,
    shard,
    stitch_blocks,
)
from lit_swa.training.distribution import start_fabric, use_tf32, use_whole_memory
from lit_swa.training.feed import ExampleFeed, join_examples
from lit_swa.training.finetuning import (
    evaluate,
    full_weights,
    load_base,
    place,
    prepare,
    resume_and_rehearse,
    tell_end,
    try_loading,
)
from lit_swa.training.linearizing import (
    LayerLosses,
    choose_softmax,
    dropout_of,
    evaluate_transfer,
    from_transfer,
    load_student,
    place_transfer,
    prepare_stages,
    refuse_of_no_stage,
    require_older_keys,
    save_unchanged,
    validate_transfer,
)
from lit_swa.training.log import read_metrics
from lit_swa.training.loop import (
    Batch,
    Progress,
    Run,
    build_optimizer,
    clip_gradients,
    learning_rate,
    set_rate,
    steps,
    validate,
)
from lit_swa.training.loss import differentiate_pieces_at_once
from lit_swa.training.memory import fitting_recompute, recompute_blocks
from lit_swa.training.precision import train_in_float32
from lit_swa.training.pretraining import new_model, prepare_pretraining, tell_pretrained
from lit_swa.training.rehearsal import rehearse
from lit_swa.training.resuming import RUN_FILE, STATE_FILE
from lit_swa.training.saving import Saver, read_record, remove_old_run, require_finite
from lit_swa.training.windows import window_of

__all__ = [
    "RUN_FILE",
    "STATE_FILE",
    "Batch",
    "ExampleFeed",
    "LayerLosses",
    "Progress",
    "Run",
    "Saver",
    "build_optimizer",
    "check_arguments",
    "choose_softmax",
    "clip_gradients",
    "differentiate_pieces_at_once",
    "dropout_of",
    "evaluate",
    "evaluate_block",
    "evaluate_transfer",
    "fitting_recompute",
    "from_transfer",
    "full_weights",
    "join_examples",
    "learning_rate",
    "load_base",
    "load_block_student",
    "load_config",
    "load_student",
    "new_model",
    "place",
    "place_transfer",
    "prepare",
    "prepare_block",
    "prepare_pretraining",
    "prepare_stages",
    "read_features",
    "read_metrics",
    "read_record",
    "recompute_blocks",
    "refuse_of_no_stage",
    "rehearse",
    "remove_old_run",
    "require_finite",
    "require_older_keys",
    "resume_and_rehearse",
    "save_block",
    "save_inputs",
    "save_unchanged",
    "set_rate",
    "shard",
    "start_fabric",
    "steps",
    "stitch_blocks",
    "tell_end",
    "tell_pretrained",
    "train_in_float32",
    "try_loading",
    "use_tf32",
    "use_whole_memory",
    "validate",
    "validate_transfer",
    "window_of",
]
