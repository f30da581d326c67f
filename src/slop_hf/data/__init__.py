"""Texts to blocks of tokens: sources, tokenizer, packed token files, and their order."""

from .config import DataConfig, Mixture, Source
from .corpus import Corpus, prepare_data
from .packing import MixedBlocks, PackedDataset
from .sources import read_documents
from .tokenizer import load_tokenizer, train_tokenizer

__all__ = [
    "Corpus",
    "DataConfig",
    "MixedBlocks",
    "Mixture",
    "PackedDataset",
    "Source",
    "load_tokenizer",
    "prepare_data",
    "read_documents",
    "train_tokenizer",
]
