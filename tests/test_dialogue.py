"""Chats to tokens: labels where the assistant speaks and nowhere else, placeholders, cuts, clear errors."""

import itertools
import json

import pytest
import torch

from omni.config import UserError
from omni.data.chat_batch import collate_chats
from omni.data.dialogue import ChatEncoder, Encoded, parse_messages, read_chats
from omni.data.mixture import ChatSamples
from omni.data.stream import BatchStream
from omni.prompt_pieces import prompt_pieces
from omni.tokenizer import AUDIO, IGNORE, IMAGE, Tokenizer, plain_text

TEXT = ["the big red circle is left of the small blue square.", "how many shapes are there? two.", "yes no maybe"] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXT, 400)


def encoder(tokenizer, ctx_len=128, audio=lambda path: 7, words=lambda path: ""):
    return ChatEncoder(tokenizer, image_positions=4, audio_positions=audio, words=words, ctx_len=ctx_len)


def chat(*turns):
    return parse_messages([{"role": role, "content": content} for role, content in turns])


def test_labels_are_the_assistants_tokens_and_its_end(tokenizer):
    messages = chat(("user", "how many?"), ("assistant", "two."), ("user", "yes?"), ("assistant", "no"))
    encoded = encoder(tokenizer).example(messages)
    assert len(encoded.tokens) == len(encoded.labels)
    learned = [label for label in encoded.labels if label != IGNORE]
    assert learned == [*tokenizer.encode(" two."), tokenizer.end_id, *tokenizer.encode(" no"), tokenizer.end_id]
    # a label is the token that follows
    for position, label in enumerate(encoded.labels[:-1]):
        if label != IGNORE:
            assert encoded.tokens[position + 1] == label


def test_the_template_is_that_of_stage_a(tokenizer):
    encoded = encoder(tokenizer).prompt(chat(("user", "how many?")))
    assert tokenizer.decode(encoded.tokens) == "<|user|> how many?<|end|><|assistant|>"


def test_media_take_their_positions_in_order(tokenizer):
    content = [
        {"type": "audio", "audio": "a.wav"},
        {"type": "text", "text": "yes"},
        {"type": "image", "image": "one.png"},
        {"type": "image", "image": "two.png"},
    ]
    encoded = encoder(tokenizer).prompt(chat(("user", content)))
    assert encoded.images == ["one.png", "two.png"] and encoded.audios == ["a.wav"]
    assert encoded.tokens.count(tokenizer.special[IMAGE]) == 8
    assert encoded.tokens.count(tokenizer.special[AUDIO]) == 7


def test_audio_takes_at_most_a_quarter_of_the_context(tokenizer):
    long = encoder(tokenizer, ctx_len=64, audio=lambda path: 100)
    encoded = long.example(chat(("user", [{"type": "audio", "audio": "a.wav"}]), ("assistant", "yes")))
    assert encoded.tokens.count(tokenizer.special[AUDIO]) == 16 == encoded.audio_positions[0]
    assert long.cuts == 1


def test_words_heard_stand_behind_their_recording_and_are_not_learned(tokenizer):
    heard = {"a.wav": "the big red circle", "b.wav": "", "c.wav": "how many <|end|> shapes"}
    content = [*({"type": "audio", "audio": name} for name in heard), {"type": "text", "text": "yes"}]
    encoded = encoder(tokenizer, words=heard.__getitem__).example(chat(("user", content), ("assistant", "two")))
    assert tokenizer.decode(encoded.tokens) == (
        f"<|user|>{AUDIO * 7} the big red circle{AUDIO * 14} how many < |end|> shapes yes<|end|><|assistant|> two"
    )
    spoken = [len(tokenizer.encode(text)) for text in (" the big red circle", " how many < |end|> shapes")]
    assert encoded.num_words == [spoken[0], 0, spoken[1]]
    assert [label for label in encoded.labels if label != IGNORE] == [*tokenizer.encode(" two"), tokenizer.end_id]


def test_words_take_at_most_a_quarter_of_the_context(tokenizer):
    content = [{"type": "audio", "audio": name} for name in ("a.wav", "b.wav")]
    short = encoder(tokenizer, ctx_len=40, audio=lambda path: 2, words=lambda path: "yes no maybe yes")
    encoded = short.example(chat(("user", content), ("assistant", "two")))
    assert 0 < encoded.num_words[1] < encoded.num_words[0] and sum(encoded.num_words) == 10
    assert (short.cuts, short.audio_cuts, short.text_cuts) == (1, 1, 0)


def test_of_a_recording_that_is_cut_away_no_words_are_left(tokenizer):
    content = [{"type": "audio", "audio": name} for name in ("a.wav", "b.wav", "c.wav")]
    long = encoder(tokenizer, ctx_len=64, audio=lambda path: 10, words=lambda path: "yes")
    encoded = long.prompt(chat(("user", content)))
    size = len(tokenizer.encode(" yes"))
    assert encoded.audio_positions == [10, 6, 0] and encoded.num_words == [size, size, 0]
    pieces = prompt_pieces(encoded, tokenizer, image_positions=4)
    assert [(piece.kind, piece.text) for piece in pieces if piece.kind == "audio"] == [
        ("audio", "a.wav"),
        ("audio", "b.wav"),
    ]
    assert "".join(piece.text for piece in pieces if piece.kind == "words") == " yes yes"
    assert sum(piece.positions for piece in pieces) == len(encoded.tokens)


def test_pictures_and_recordings_keep_their_places_where_text_is_cut(tokenizer):
    short = encoder(tokenizer, ctx_len=24, audio=lambda path: 9)
    sound, picture = {"type": "audio", "audio": "a.wav"}, {"type": "image", "image": "one.png"}
    long = {"type": "text", "text": "how many shapes are there? " * 10}
    encoded = short.example(chat(("user", [sound, long, picture]), ("assistant", "yes")), where="sft.jsonl:3")
    assert len(encoded.tokens) == len(encoded.labels) == 24
    assert encoded.tokens.count(tokenizer.special[AUDIO]) == 6 and encoded.tokens.count(tokenizer.special[IMAGE]) == 4
    assert all(label == IGNORE for label in encoded.labels)
    assert (short.cuts, short.audio_cuts, short.text_cuts, short.mute) == (1, 1, 1, 1)
    assert short.report == "the ends of 1 recordings, text of 1 chats, 1 of which lost all of their answers"
    short.begin_count()
    # an earlier answer is left
    turns = chat(("user", [picture]), ("assistant", "no"), ("user", [long, picture]), ("assistant", "yes"))
    encoded = short.example(turns)
    assert [label for label in encoded.labels if label != IGNORE] == [*tokenizer.encode(" no"), tokenizer.end_id]
    assert encoded.tokens.count(tokenizer.special[IMAGE]) == 8 and short.mute == 0 and short.text_cuts == 1
    with pytest.raises(UserError, match=r"sft\.jsonl:3: pictures and recordings alone take 28 positions, .* at most"):
        short.example(chat(("user", [picture] * 7), ("assistant", "yes")), where="sft.jsonl:3")


def test_a_long_chat_is_cut_and_counted(tokenizer):
    short = encoder(tokenizer, ctx_len=16)
    encoded = short.example(chat(("user", "how many?"), ("assistant", "the big red circle " * 10)))
    assert len(encoded.tokens) == 16 and short.cuts == 1
    with pytest.raises(UserError, match="at most 16"):
        short.prompt(chat(("user", "the big red circle " * 10)))


def test_a_user_cannot_write_special_tokens(tokenizer):
    encoded = encoder(tokenizer).prompt(chat(("user", "yes<|end|><|assistant|>no")))
    assert encoded.tokens.count(tokenizer.end_id) == 1
    assert plain_text("<|end|>") != "<|end|>"


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([{"role": "robot", "content": "x"}], "role"),
        ([{"role": "user"}], "content"),
        ([{"role": "user", "content": [{"type": "video", "video": "x"}]}], "parts"),
        ([{"role": "assistant", "content": [{"type": "image", "image": "x.png"}]}], "assistant"),
        (["text"], "object"),
    ],
)
def test_malformed_messages_are_named(messages, expected):
    with pytest.raises(ValueError, match=expected):
        parse_messages(messages)


def test_read_chats_lists_every_problem_by_line(tmp_path):
    path = tmp_path / "sft.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]},
        {"messages": [{"role": "user", "content": "hello"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "no.png"}]},
                {"role": "assistant", "content": "x"},
            ]
        },
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    with pytest.raises(UserError) as caught:
        read_chats(path)
    assert f"{path}:2" in str(caught.value) and f"{path}:3" in str(caught.value) and "no.png" in str(caught.value)


def epoch_of(samples, epoch, seed=0):
    """The tokens of an epoch's samples, and of each batch."""
    stream = BatchStream(samples, 2, seed, samples.lengths, quotas=samples.quotas)
    batches = [[samples.sample(index, None).tokens[0] for index in batch] for batch in stream.order(epoch)]
    return sorted(itertools.chain(*batches)), batches


def test_weights_and_replay_set_how_often_a_task_occurs():
    chats = [Encoded([i], [i]) for i in range(6)]
    replay = [Encoded([100 + i], [100 + i]) for i in range(5)]
    samples = ChatSamples(chats, ["a", "a", "b", "b", "b", "b"], {"a": 3.0, "b": 0.5}, lambda s: s, replay, 0.2)
    epochs = [epoch_of(samples, epoch)[0] for epoch in range(20)]
    for tokens in epochs:
        assert len(tokens) == 10 and tokens[:6] == [0, 0, 0, 1, 1, 1] and tokens[8:] == [100, 101]
        assert len(set(tokens[6:8])) == 2  # half of the four, each at most once
    assert set(itertools.chain(*epochs)) == {0, 1, 2, 3, 4, 5, 100, 101}  # another half in another epoch
    assert epoch_of(samples, 3) == epoch_of(samples, 3) and epoch_of(samples, 3) != epoch_of(samples, 3, seed=1)
    anew = ChatSamples(chats, ["a"] * 6, {}, lambda s: s, replay, 0.25, replay_anew=True)
    epochs = [epoch_of(anew, epoch)[0] for epoch in range(20)]
    assert all(tokens[:6] == [0, 1, 2, 3, 4, 5] and len(tokens) == 8 for tokens in epochs)
    assert {token for tokens in epochs for token in tokens if token >= 100} == {100, 101, 102, 103, 104}
    never = ChatSamples(chats, ["a", "a", "b", "b", "b", "b"], {"a": 0.0}, lambda s: s)
    assert epoch_of(never, 0)[0] == [2, 3, 4, 5]


def test_without_weights_an_epoch_is_every_sample_once():
    samples = ChatSamples([Encoded([i], [i]) for i in range(6)], ["a"] * 6, {}, lambda s: s)
    plain = BatchStream(samples, 2, 0, samples.lengths)
    assert samples.quotas == [] and BatchStream(samples, 2, 0, samples.lengths, quotas=samples.quotas).order(2) == (
        plain.order(2)
    )


def test_weights_of_no_task_are_refused():
    chats = [Encoded([i], [i]) for i in range(6)]
    with pytest.raises(UserError, match="task_weights"):
        ChatSamples(chats, ["a"] * 6, {"c": 1.0}, lambda s: s)


def test_padding_is_no_label_and_features_keep_their_order():
    chats = [
        Encoded([1, 2, 3], [2, 3, 4], images=["x"]),
        Encoded([5], [6], images=["y"], audios=["z"], audio_positions=[2]),
    ]
    batch = collate_chats(chats, lambda p: torch.full((4, 2), float(ord(p))), lambda p: torch.ones(5, 3), pad_id=0)
    assert batch.counts == {"answers": 4, "replay": 0, "tokens": 4}
    assert batch.tokens_BT.shape[1] % 16 == 0 and (batch.labels_BT[1, 1:] == IGNORE).all()
    assert batch.patches_NPD[:, 0, 0].tolist() == [ord("x"), ord("y")]
    left = collate_chats(chats, lambda p: torch.ones(4, 2), lambda p: torch.ones(5, 3), pad_id=0, left=True)
    assert left.tokens_BT[1].tolist() == [0, 0, 5] and left.valid_BT[1].tolist() == [False, False, True]
