"""The tokenizer of the tiny model: byte-level BPE trained on the fixed text below, in a second and without a download.

Special ids are SmolLM2's (0 <|endoftext|>, 1 <|im_start|>, 2 <|im_end|>), and so is the chat format. Every byte is in
the alphabet, so any text survives encoding and decoding; every word of `WORDS` is one token after a space, and those of
`ANSWER_WORDS` also at the start of a text, so that the tiny model spends its steps on looking and not on spelling.
"""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY_SIZE = 1024
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_ANSWERS = """
red green blue yellow orange purple pink cyan white black grey brown
circle square triangle cross ring bar diamond star heart moon arrow hexagon
zero one two three four five six seven eight nine ten
top bottom left right middle corner up down nothing yes no first third fourth fifth last
"""
_OTHERS = """
eleven twelve sixteen sixth seventh eighth row column centre edge above below beside between next near far place cell
circles squares triangles crosses rings bars diamonds stars hearts moons arrows hexagons grid side
which what where when how many much who why often shape shapes colour colours picture pictures image images photo
video clip frame frames second seconds time times object objects thing things number
does do did has have had is are was were be been the a an of in at on to it its this that these those there here
and or not but with without from by for as if then than after before end ends start starts every each all same
other another both only also now again while once moves moved move stays stay turns turn becomes become changes
change goes go comes come shows show shown appears appear seen see look looks stands stand points point follows
follow named cued cue chain background dark light bright small large hidden behind along across toward
write brief caption would webvid provide detailed narration happens describe detail
helpful assistant you user system answer question letter option options choose correct
"""
ANSWER_WORDS = tuple(_ANSWERS.split())
WORDS = ANSWER_WORDS + tuple(_OTHERS.split())

_SENTENCES = (
    "system\nYou are a helpful AI assistant.",
    "user\nWrite a brief caption for this video.",
    "user\nWhat would be the WebVid caption for this video?",
    "user\nProvide a detailed narration of what happens in this video.",
    "user\nDescribe what happens in this video in detail.",
    "user\nWhich shape has the cued colour?",
    "user\nWhere is the red square in the last frame?",
    "user\nHow many circles are there in the picture?",
    "assistant\nThere is a blue ring in the top left corner.",
    "assistant\nIn the first frame a green arrow points right.",
    "assistant\nAt the end it stands in row two, column three.",
)


def build_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tiny tokenizer: at most `VOCABULARY_SIZE` tokens, the same ones in every process."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_training_texts(), trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=SPECIAL_TOKENS[1],
        eos_token=SPECIAL_TOKENS[2],
        pad_token=SPECIAL_TOKENS[2],
        unk_token=SPECIAL_TOKENS[0],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
    )


def _training_texts() -> list[str]:
    """Sentences twice and words three times: a whole word counts for more than an accidental piece of two words."""
    spaced = [f" {word}" for word in WORDS]
    return [*_SENTENCES * 2, *spaced * 3, *ANSWER_WORDS * 3]
