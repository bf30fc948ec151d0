"""Small tokenizers of transformers, trained on the spot: SigLIP's kind and BERT's."""

from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "a red cat and two dogs ran over the green hill",
    "one bird sings, four fish swim in the blue sea",
    "the fifth sentence ends it with a thing number 12345",
    "what is drawn: smiling face, black heart, white star",
]


def siglip_tokenizer(folder: Path) -> str:
    """A unigram model that ends each text, and pads it, with one token; no start token."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>")
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return _save(tokenizer, folder, eos_token="</s>", pad_token="</s>", unk_token="<unk>")


def bert_tokenizer(folder: Path, **special: str) -> str:
    """Word pieces between [CLS] and [SEP], padded with id 0."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    tokenizer.train_from_iterator(TEXTS, trainer)
    marks = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    return _save(tokenizer, folder, **{"pad_token": "[PAD]", "unk_token": "[UNK]", **special})


def _save(tokenizer: Tokenizer, folder: Path, **special: str) -> str:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return str(folder)
