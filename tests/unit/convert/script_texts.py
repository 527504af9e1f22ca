"""More than a thousand short texts of many scripts, always the same ones: drawn from ranges of Unicode, and hard cases
by hand."""

from __future__ import annotations

import random
import unicodedata
from itertools import chain, pairwise

PER_SCRIPT = 64
RANGES: dict[str, tuple[tuple[int, int], ...]] = {
    "latin": ((0x41, 0x5A), (0x61, 0x7A)),
    "latin with accents": ((0x61, 0x7A), (0xC0, 0x17F), (0x1E00, 0x1EFF)),
    "cyrillic": ((0x400, 0x45F), (0x48A, 0x4FF)),
    "greek": ((0x386, 0x3CE), (0x1F00, 0x1FFE)),
    "arabic": ((0x620, 0x64A), (0x671, 0x6D3), (0x64B, 0x652)),
    "hebrew": ((0x5D0, 0x5EA), (0x5B0, 0x5BC)),
    "devanagari": ((0x904, 0x939), (0x93E, 0x94D), (0x966, 0x96F)),
    "thai": ((0xE01, 0xE3A), (0xE40, 0xE4E)),
    "cjk": ((0x4E00, 0x4FFF), (0x3041, 0x3096), (0x30A1, 0x30FA), (0x20000, 0x200FF)),
    "hangul": ((0xAC00, 0xAFFF), (0x1100, 0x1112), (0x1161, 0x1175)),
    "emoji": ((0x1F600, 0x1F64F), (0x1F300, 0x1F5FF), (0x1F3FB, 0x1F3FF), (0x200D, 0x200D), (0xFE0F, 0xFE0F)),
    "symbols": ((0x2190, 0x22FF), (0x2460, 0x24FF), (0x2600, 0x26FF), (0x20A0, 0x20BF)),
    "control characters": ((0x00, 0x1F), (0x7F, 0x9F), (0x200B, 0x200F), (0x2028, 0x202E), (0xFEFF, 0xFEFF)),
    "private and unassigned": ((0xE000, 0xE0FF), (0x378, 0x379), (0x1FFFE, 0x1FFFF), (0x10FFFD, 0x10FFFF)),
    "compatibility forms": ((0xFB00, 0xFB06), (0xFF01, 0xFFEE), (0x2100, 0x214F), (0x3300, 0x33FF), (0xFB50, 0xFDFB)),
    "combining": ((0x61, 0x65), (0x300, 0x345), (0x1AB0, 0x1ABE), (0x20D0, 0x20DC)),
}
SPACES = (" ", "  ", "   ", "\t", "\n", "\r\n", "\u00a0", "\u2003", "\u3000", " \t ", "\n\n", " " * 17)
FAMILIES = "👩‍👩‍👧‍👦 🏳️‍🌈 👨🏽‍💻 🇩🇪🇫🇷🇯🇵 1️⃣ #️⃣ ❤️‍🔥 🧑🏿‍🤝‍🧑🏻 ☺️ ☺ 👍🏻👍🏿"
TRAPS = "ﬁ ﬀ ﬃ Ⅷ ㎏ ① ½ ² ™ Å Å ﷺ ㍿ ｶﾞ ガ ガ ẛ̣ ﬅ ℌ 𝔸 ſ ǆ ΐ Ǆ ﾡ ㈀ ё ё é é ﬃ̈ ͅα ˚ ¨ \u00adsoft İi̇ ıI ßẞ ΣΑΣ ς"
RESERVED = "<s> </s> <unk> <pad> <mask> <0x00> <0x0A> <0xFF> </s><s> <s <0x <0xG0> s> </ > <|im_start|> [MASK] {{x}}"
MIXED = (
    "naïveСъешь ελλ日本語العربيةעבריתहिन्दीไทย한국어👩‍💻 x=1;y\t=2\n\nfoo_bar(α,β) "
    "東京2026年 №5 100％ ½кг ﷺ۱۲۳ I❤️NY e\u0301l ñandú—“q” …"
)


def texts_by_script() -> dict[str, list[str]]:
    """All of them."""
    found = {name: [_sentence(f"{name}/{n}", (name,)) for n in range(PER_SCRIPT)] for name in RANGES}
    found["mixed scripts"] = [_sentence(f"mixed/{n}", tuple(RANGES)) for n in range(2 * PER_SCRIPT)]
    found["spaces"] = [
        left + space * times + right for space in SPACES for times in (1, 2, 5) for left, right in _SIDES
    ]
    found["by hand"] = list(chain.from_iterable(_pieces(text) for text in (FAMILIES, TRAPS, RESERVED, MIXED)))
    return found


_SIDES = (("", ""), ("a", ""), ("", "é"), ("日", "ж"))


def _sentence(key: str, scripts: tuple[str, ...]) -> str:
    """One to eight words, each of one script, with whatever is taken for a space between them."""
    draw = random.Random(key)
    words = []
    for _ in range(draw.randint(1, 8)):
        ranges = RANGES[draw.choice(scripts)]
        words.append("".join(chr(draw.randint(*draw.choice(ranges))) for _ in range(draw.randint(1, 9))))
        words.append(draw.choice(SPACES) if draw.random() < 0.3 else " ")
    return "".join(words[: len(words) - draw.randint(0, 1)])


def _pieces(text: str) -> list[str]:
    """A text, its words alone and in pairs, and all of it in each normal form and in capitals."""
    words = text.split(" ")
    forms = [unicodedata.normalize(form, text) for form in ("NFC", "NFD", "NFKC", "NFKD")]
    return [text, text[::-1], text.upper(), text.casefold(), *forms, *words, *(a + b for a, b in pairwise(words))]
