"""Texts to blocks of tokens: sources, tokenizer, packed token files."""

from .corpus import Corpus, prepare_data
from .packing import PackedDataset
from .sources import DataConfig, documents
from .tokenizer import load_tokenizer, train_tokenizer

__all__ = ["Corpus", "DataConfig", "PackedDataset", "documents", "load_tokenizer", "prepare_data", "train_tokenizer"]
