"""Training data: instructions, conversations and plain text as token ids with labels, packed or not.

Reading order: records (what the keys of an example mean) -> readers (files of examples) -> prompts (text, ids, what is
trained) -> dataset (examples over one flat array, packing) -> token_files (plain text, .bin) -> prepared (tokenised
directories) -> hub (published datasets) -> load (load_dataset) -> checks (samples, refusals).
For pretraining: corpora (published texts) -> sources (files and streams, in parts) -> encode (documents to ids) ->
prepare (directories of token files, by several processes); train_tokenizer. lit_swa/token_files.py reads the files.
"""

from lit_swa.config import IGNORED
from lit_swa.data.checks import check_dataset, show_examples, unheard_end
from lit_swa.data.dataset import Dataset, Example, pack, split_dataset
from lit_swa.data.hub import PRESETS
from lit_swa.data.load import load_dataset
from lit_swa.data.prepared import save_dataset
from lit_swa.data.prompts import PROMPT_STYLES, encode_examples, encode_record
from lit_swa.data.records import Record
from lit_swa.data.token_files import check_tokens, open_token_file, write_token_file

__all__ = [
    "IGNORED",
    "PRESETS",
    "PROMPT_STYLES",
    "Dataset",
    "Example",
    "Record",
    "check_dataset",
    "check_tokens",
    "encode_examples",
    "encode_record",
    "load_dataset",
    "open_token_file",
    "pack",
    "save_dataset",
    "show_examples",
    "split_dataset",
    "unheard_end",
    "write_token_file",
]
