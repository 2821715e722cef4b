"""Text to token ids and back."""

from pyllm.text.formats import TokenizerError
from pyllm.text.marian import MarianTokenizer
from pyllm.text.tokenizer import Detokenizer, Tokenizer

__all__ = ["Detokenizer", "MarianTokenizer", "Tokenizer", "TokenizerError"]
