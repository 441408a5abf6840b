"""How a Whisper transcribes, checked against what the model can do."""

import difflib
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase, WhisperForConditionalGeneration
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

from speechkd.data.collate import WhisperTokens

# A CPU encodes one clip after the other, and from here on it gains nothing by decoding more together. A GPU takes what
# its memory holds: the labeller halves this until it fits.
AUTO_BATCH_SIZE = {"cpu": 16, "cuda": 256}
MULTILINGUAL_VOCABULARY = 51_865  # the size of openai/whisper's first multilingual one, above all English-only ones


@dataclass(kw_only=True)
class DecodingConfig:
    """How a Whisper transcribes.

    Args:
        language: language code of the audio; null for English-only models.
        task: transcribe, or translate into English.
        batch_size: clips decoded together; "auto" takes what fits on a GPU, and 16 on a CPU.
        max_new_tokens: longest transcript in tokens; at most 444.
        num_workers: processes that decode audio files; 0 decodes in the main process.
        timestamps: put each segment between timestamps; `strip_timestamps` takes them out again.
    """

    language: str | None = "en"
    task: Literal["transcribe", "translate"] = "transcribe"
    batch_size: int | Literal["auto"] = 16
    max_new_tokens: int = 224
    num_workers: int = 0
    timestamps: bool = False

    def __post_init__(self) -> None:
        if self.batch_size != "auto" and self.batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, or auto, got {self.batch_size}")
        if not 1 <= self.max_new_tokens <= 444:
            raise ValueError(
                f"max_new_tokens must be 1 to 444 (Whisper's context less its prefix), got {self.max_new_tokens}"
            )

    def clips_per_batch(self, device: torch.device) -> int:
        """Clips to decode together on a device, at most: a GPU may turn out to hold fewer."""
        return AUTO_BATCH_SIZE.get(device.type, 16) if self.batch_size == "auto" else self.batch_size


def decoding_tokens(
    model_name: str,
    model: WhisperForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    decoding: DecodingConfig,
) -> WhisperTokens:
    """Special tokens of a teacher for the language and task asked for.

    Raises:
        ValueError: an English-only teacher with a language or for translation, a multilingual one without a language,
            or a language that it does not know.
    """
    language = decoding.language
    # checkpoints older than the generation config's field tell by their vocabulary
    is_multilingual = getattr(
        model.generation_config, "is_multilingual", model.config.vocab_size >= MULTILINGUAL_VOCABULARY
    )
    if not is_multilingual and (language is not None or decoding.task != "transcribe"):
        asked = f"language {language!r}" if decoding.task == "transcribe" else f"task {decoding.task!r}"
        raise ValueError(
            f"teacher {model_name!r} knows English only and takes no {asked}; pass --language none and --whisper-task "
            "transcribe (language: null), or a multilingual teacher"
        )
    if is_multilingual and language is None:
        raise ValueError(
            f"teacher {model_name!r} is multilingual and must be told the language of the audio; pass for example "
            "--language en (none is for English-only models)"
        )
    vocabulary = tokenizer.get_vocab()
    known = [code for code in LANGUAGES if f"<|{code}|>" in vocabulary]
    if language is not None and language not in known:
        raise ValueError(
            f"teacher {model_name!r} does not know the language {language!r}; near ones are "
            f"{', '.join(_near_languages(language, known))}. It knows {len(known)}: {', '.join(known)}"
        )
    return WhisperTokens.from_tokenizer(tokenizer, language=language, task=decoding.task)


def _near_languages(language: str, known: list[str]) -> list[str]:
    """Codes that may be meant, with their names: of a name, of `de-AT`, of a slip of the pen."""
    names = {name: code for name, code in TO_LANGUAGE_CODE.items() if code in known}
    wanted = language.lower().replace("_", "-")
    candidates = difflib.get_close_matches(wanted, [*known, *names], n=5, cutoff=0.5)
    codes = [wanted.split("-")[0], *(names.get(candidate, candidate) for candidate in candidates), "en"]
    return [f"{code} ({LANGUAGES[code]})" for code in dict.fromkeys(codes) if code in known][:3]
