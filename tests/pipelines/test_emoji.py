"""The captioned picture set: names, the held-out rule, pictures on white."""

import numpy as np

from pipelines import emoji


def test_pictures_have_their_names():
    items = emoji.load_emoji()
    names = {item.caption: item for item in items}
    assert len(items) == len(names) == 3953
    assert names["fox"].code == "1f98a"
    assert names["woman astronaut medium skin tone"].skin_tones == 1
    assert "flag of Madagascar" in names and not names["flag of Madagascar"].mirrorable
    assert not names["backhand index pointing left"].mirrorable
    assert names["fox"].mirrorable


def test_held_out_captions_are_five_percent_and_their_words_all_occur_elsewhere():
    items = emoji.load_emoji()
    flags = emoji.held_out(items)
    kept = {word for item, held in zip(items, flags, strict=True) if not held
            for word in item.caption.split()}  # fmt: skip
    held = [item.caption for item, flag in zip(items, flags, strict=True) if flag]
    assert 0.045 < len(held) / len(items) < 0.055
    assert all(word in kept for caption in held for word in caption.split())
    assert flags == emoji.held_out(items)
    # By hash: leaving a picture out of the set does not reshuffle the rest.
    fewer = dict(zip([i.caption for i in items[1:]], emoji.held_out(items[1:]), strict=True))
    same = sum(fewer[caption] for caption in held if caption in fewer)
    assert same >= 0.9 * len(held)


def test_pictures_are_drawn_on_white():
    items = [item for item in emoji.load_emoji() if item.caption == "fox"]
    picture = emoji.load_pictures(items, 32)
    assert picture.shape == (1, 32, 32, 3) and picture.dtype == np.uint8
    assert (picture[0, 0, 0] == 255).all()  # a corner is background
    red, _, blue = picture[0].reshape(-1, 3).mean(0)
    assert red > blue + 20  # a fox is orange
