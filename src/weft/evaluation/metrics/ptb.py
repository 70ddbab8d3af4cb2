"""Words of a caption as the COCO caption evaluation counts them: Penn Treebank tokens in lower case, less punctuation.

All published CIDEr, BLEU and ROUGE-L of captions were computed on these words, which a Java program (Stanford's
PTBTokenizer 3.4.1) made. This is a lexer with the same behaviour: at each place every rule is tried, the longest match
wins, context behind it included, and of equal ones the earlier rule. The rules were found by running that program on
text made for the purpose; `tests/evaluation/metrics/test_ptb.py` says where the two are known to part.
"""

import functools
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

REMOVED = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))
"""Brackets are on the original's list too, but in capitals, and tokens are in lower case by then: they stay."""


def tokenize(text: str, following: str = "") -> str:
    """The words of a caption, joined by single blanks.

    A few words hold a space of their own, which does not break (`1 1/2`); `str.split` splits there, as in the original.

    Args:
        text: a caption.
        following: the lines behind it, which the original, reading a corpus as one text, looks at: of `the letter B.`
            the full stop is the sentence's if the next caption begins with `A`, and else the letter's.
    """
    return " ".join(word for word in tokens(text.replace("\n", " "), following) if word not in REMOVED)


def tokens(text: str, following: str = "") -> list[str]:
    """All tokens of a line, in lower case, punctuation included."""
    return [part.lower() for token in _tokens(text, following) for part in token.split(" ") if part]


_APOS = "(?:['\x92\u2019]|(?i:&apos;))"
_ANY_APOS = "(?:['`\x91\x92\u2018\u2019\u201b]|(?i:&apos;))"
_QUOTES = str.maketrans(
    {
        **dict.fromkeys("\x92\u2019\u203a", "'"),
        **dict.fromkeys("\x91\u2018\u201b\u2039", "`"),
        **dict.fromkeys("\x94\u201d\xbb", "''"),
        **dict.fromkeys("\x93\u201c\xab", "``"),
        **dict.fromkeys("\x82\x84", ""),
    }
)
"""Marks as ASCII has them."""
_MARKS = "\u0300-\u036f\u0483-\u0487\u0591-\u05c7\u064b-\u065e\u0900-\u0963\u0966-\u0e3a\u0e47-\u0e4e\u0eb1-\u0ecd"
_NUMERALS = "\xb2\xb3\xb9\xbc-\xbe\u2070-\u209c\u2150-\u218b\u2460-\u24ff\u2776-\u2793"
_LETTER = rf"(?:(?![{_NUMERALS}])[^\W\d_\U00010000-\U0010ffff])"
_L = rf"(?:{_LETTER}|[{_MARKS}\xad])"
_DIGITS = r"\d(?:[\d\xad]*\d)?"
"""Soft hyphens are read over inside numbers and words, and each kind of them differs where they may stand."""
_LD = rf"(?:{_L}|\d)"
_ALNUM = rf"(?:{_LETTER}|\d)"
"""Without what _LD has besides: marks and soft hyphens."""
_SPACE = "[ \t\xa0\u2000-\u200a\u3000]"
_BLANK = rf"(?:{_SPACE}|\n)"
_HYPHEN = "[-_\u058a\u2010\u2011]"
_AMP = "&(?:(?i:amp);)?"
_WORD = rf"{_L}{_LD}*(?:[.!?]{_L}{_LD}*)*"
_ELIDED = rf"(?:[dDoOlL]{_ANY_APOS}{_ALNUM})?"
_HYPHENED = rf"{_ELIDED}{_ALNUM}+(?:{_HYPHEN}{_ELIDED}{_ALNUM}+)*"
_DOTTED = r"[A-Za-z0-9][A-Za-z0-9.,\xad]*(?:-[A-Za-z0-9\xad]+)"
_AMPED = rf"[A-Z]+(?:(?:[+]|{_AMP})[A-Z]+)+"
_WITHIN = rf"(?:[A-HJ-XZn]{_ANY_APOS}{_LETTER}{_LETTER}+|{_LETTER}+[aeiouyAEIOUY]{_ANY_APOS}[aeiouA-Z]{_LETTER}*)"
_NUMBER = rf"(?:\xad*(?:{_DIGITS})?(?:[.:,\u066b\u066c]{_DIGITS})+|\xad*{_DIGITS})"
_AUX = rf"{_APOS}(?:[msdMSD]|[rR][eE]|[vV][eE]|[lL][lL])"
_SYMBOLS = (
    r"\xa1\xa5-\xa9\xac\xae-\xb4\xb6-\xb9\xbf\xd7\xf7\u2016\u2017\u201a\u201e-\u2023\u2030-\u2038\u203b"
    r"\u203e-\u2042\u2044\u2070-\u208e\u20a4\u2100-\u214f\u2155-\u215e\u2190-\u2bff\u3001\u3002\u3012\u30fb"
    r"\u061b\u060c\u061f\u06d4\u0964\u0965\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\uffe0\uffe1"
    r"\uffe5\uffe6"
)
"""Each a token of its own."""
_URL_END = r"[^ \t\n\"<>|.!?(){},-]"
_DOMAIN = r"[^ \t\n\"`'<>|.!?(){},-_$]+\."
"""`,-_` is a range: no digits, capitals, slashes or colons."""
_URL_TEXT = r"[^ \t\n\"<>|()"
"""The beginning of a set; what else an address cannot hold depends on its kind."""
_PATH = rf"(?:/{_URL_TEXT}]+{_URL_END})?"
_NAME = "[A-Za-z][A-Za-z0-9_:.-]*"
_ATTRIBUTE = rf" +{_NAME}(?: *= *(?:'[^'\n]*'|\"[^\"\n]*\"|{_NAME}))?"
_TAG = rf"<(?:[!?][A-Za-z-][^>\n]*|/{_NAME} *|{_NAME}(?:{_ATTRIBUTE})* */? *)>"

_IN_TWO = "cannot gimme gonna gotta lemme wanna"
_ABBREVIATIONS = """
    adj adm adv alex assoc asst atty attys ave brig capt cf cie cmdr col comdr cpl dept det dr drs elec ens ft gen gov
    govs hon insp invt jos lieut lt maj messrs mlle mme mr mrs ms msgr mt natl pfc ph pres prof profs pvt rep reps rev
    sen sens sfc sgt spc st ste supt supts treas vs wm
"""
_PARTING = r"""
    al ala apr ariz assn aug bancorp bhd bldg blvd bros calif co colo conn corp cos ct dak dec ed\.d esq est etc
    ext feb fla fri ga inc ind intl jan jr jul jun kan kans ky ltd mar md mich minn mo mon mont neb nev nov oct okla
    penn ph\.d plc rd rt sep sept seq sq sr sys tel tenn thu thurs tue tues univ va vt wed wis wisc wyo
"""
"""Months, days, states, companies and the like: they part from what is glued to them as well."""
_PARTING_CAPITALIZED = "ark az del ill la mass miss ore pa tex wash"
"""Without a capital these are words."""
_NUMBERED = "art ca fig figs no nos op pp prop"
"""Abbreviations before a number only."""
_STARTERS = r"""
    A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Now Once One
    Other Our She Since So Some Such That The Their Then There These They This We What When While Yet You Mr\. Ms\.
"""
"""Words that begin a sentence: a single letter before them ends one."""
_FILES = """
    jpe?g png gif bmp pdf txt html? xml exe docx? ppt zip tar gz py java c h cpp php mp3 wav mov bat pl dll jar class ps
    x
"""
"""Ends of file names."""


def _any_of(words: str) -> str:
    return "(?:" + "|".join(sorted(words.split(), key=len, reverse=True)) + ")"


_PARTS = rf"(?:(?i:{_any_of(_PARTING)})|(?=[A-Z])(?i:{_any_of(_PARTING_CAPITALIZED)})|[pP](?:p?t[ey]|t[ey]s))\."


class _Rule(NamedTuple):
    pattern: re.Pattern[str]
    """What is matched; a group that took part is the token, and the rest its context."""
    write: Callable[[str], str]
    """The token as it is written; blanks part tokens."""


def _same(token: str) -> str:
    return token


def _straight(token: str) -> str:
    return token.replace("&apos;", "'").translate(_QUOTES)


def _ampersand(token: str) -> str:
    return re.sub(_AMP, "&", token)


def _soft(token: str) -> str:
    return token.replace("\xad", "") or "-"


def _joined(token: str) -> str:
    return re.sub(_SPACE, "\xa0", token)


def _round(token: str) -> str:
    return token.replace("(", "-lrb-").replace(")", "-rrb-")


def _brackets(token: str) -> str:
    for mark, name in (("[", "-lsb-"), ("]", "-rsb-"), ("{", "-lcb-"), ("}", "-rcb-")):
        token = token.replace(mark, name)
    return _round(token)


def _always(written: str) -> Callable[[str], str]:
    return lambda _: written


def _phone(token: str) -> str:
    return _round(_joined(token))


_RULES = [
    _Rule(re.compile(pattern), write)
    for pattern, write in (
        (rf"(?i:(?={_any_of(_IN_TWO)})(...)(?:not|..)|('t)(?:is|was))", _same),
        (_TAG, _joined),
        (rf"({_WORD})(?:{_AUX})", _soft),
        (rf"([A-Za-z\xad]*[A-MO-Za-mo-z]\xad*)[nN]{_ANY_APOS}[tT]", _soft),
        (rf"[nN]{_ANY_APOS}[tT]", _straight),
        (rf"({_AUX})[^A-Za-z]", _straight),
        (_WORD, _soft),
        (rf"{_APOS}[nN]{_APOS}?|[lLdDjJ]{_APOS}|(?i:dunkin|somethin|ol){_APOS}|(?i:{_APOS}(?:em|cause|till?))", _same),
        (rf"(?i:{_APOS}[2-9]0s|c{_APOS}est|cap{_APOS}n|e'er|c'mon|ev'ry|li'l|nat'l)", _same),
        (rf"(?i:s'mores|nor'easter|cont'd\.|o{_ANY_APOS}o)", _same),
        (r"(?i:pro|anti)-", _same),
        (rf"(?i:s{_AMP}(?:ls|p-500))", _ampersand),
        (_WITHIN, _same),
        (rf"([yY]{_APOS}){_L}", _same),
        (rf"({_APOS}\d\d){_BLANK}", _same),
        (rf"(?i:https?)://{_URL_TEXT}{{}}]+{_URL_END}", _same),
        (rf"(?:(?i:www)\.(?:{_URL_TEXT}/.!?{{}},]+\.)+[a-zA-Z]{{2,4}}|(?:{_DOMAIN})+(?i:com|net|org|edu)){_PATH}",
         _same),
        (rf"(?:&lt;|<)?[a-zA-Z0-9]{_URL_TEXT}\xa0{{}}]*@(?:{_URL_TEXT}\xa0{{}}.]+\.)*{_URL_TEXT}\xa0{{}}.]+"
         r"(?:&gt;|>)?", _same),
        (rf"({_PARTS})(?:.|\n){{2}}", _same),
        (rf"#{_L}+|@[A-Za-z_][A-Za-z_0-9]*", _same),
        (r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}", _same),
        (rf"[-+]?{_NUMBER}", _soft),
        (r"[\u207a\u207b\u208a\u208b]?(?:[\u2070\xb9\xb2\xb3\u2074-\u2079]+|[\u2080-\u2089]+)", _same),
        (r"(?:\d{1,4}[- \xa0])?\d{1,4}(?:\\?/|\u2044)\d{1,4}", _joined),
        (rf"{_DOTTED}*-(?:[A-Za-z]\.){{2,}}(?:-[A-Za-z0-9\xad]+)*", _soft),
        (rf"{_DOTTED}+", _soft),
        ("\xbc", _always("1/4")),
        ("\xbd", _always("1/2")),
        ("\xbe", _always("3/4")),
        ("\u2153", _always("1/3")),
        ("\u2154", _always("2/3")),
        ("[\u20ac\xa4\x80\u20a0]", _always("$")),
        ("\xa3", _always("#")),
        ("\xa2", _always("cents")),
        (r"[A-Z]*\$|#+", _same),
        (r"[A-Za-z](?:\.[A-Za-z])*\.", _same),
        (rf"({_LD}+(?:\.{_LD}+)*\.(?i:{_any_of(_FILES)}))(?:{_BLANK}|[.,?!])", _same),
        (r"[A-Za-z](?:\.[A-Za-z])+\.?-[A-Za-z]+[A-Za-z0-9\xad]*(?:-[A-Za-z0-9\xad]+)*", _soft),
        (rf"([A-Za-z])\.{_BLANK}+(?:{_any_of(_STARTERS)}|{_any_of(_STARTERS.upper())}|{_TAG}){_BLANK}", _same),
        (rf"(?i:{_any_of(_ABBREVIATIONS)})\.|[mM][ft]g\.|{_PARTS}", _same),
        (rf"((?i:{_any_of(_NUMBERED)})\.){_BLANK}?\d", _same),
        (rf"((?:{_WORD}|{_HYPHENED}|{_DOTTED}+|{_AMPED})\.)[,;:]", _soft),
        (r"(?:\(\d{2,3}\)[ \xa0]?|(?:\+\+?)?(?:\d{2,4}[- \xa0])?\d{2,4}[- \xa0])\d{3,4}[- \xa0]?\d{3,5}"
         r"|(?:(?:\+\+?)?\d{2,4}\.)?\d{2,4}\.\d{3,4}\.\d{3,5}", _phone),
        ("(')[A-Za-z][^ \t\xa0\n]", _always("'")),
        (_AUX, _straight),
        (r"([<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]])[^A-Za-z0-9]", _round),
        (r"[-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)", _round),
        (_HYPHENED, _soft),
        (_AMPED, _ampersand),
        (r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}", _same),
        (r"\.{3,5}|\.(?:[ \xa0]\.){2,4}|\u2026", _always("...")),
        (r"[?!]+", _same),
        (r"-{2,4}|[\x96\x97\u2013\u2014\u2015]|(?i:&[mn]dash;)", _always("--")),
        (r"-{5,}|\*+|_+|@+|[~^]", _same),
        (r"(?i:&nbsp;)", _always("")),
        (r"(?i:&amp;)", _always("&")),
        (r"(?i:&lt;)", _always("<")),
        (r"(?i:&gt;)", _always(">")),
        (r"[`\u2018-\u201f\u2039\u203a\xab\xbb\x82\x84\x91-\x94]{1,2}", _straight),
        (r"\"|&quot;|''", _always("''")),
        (rf"{_APOS}|(?i:&quot;)", _straight),
        (r"&#\d+;|<<|>>|[cC]\+\+|[cCfF]#|(?:\\\*)+", _same),
        (r"[]()\[{}]", _brackets),
        (r"-(?i:[lr][rsc]b)-", _same),
        (r"[-.,:;/\\|&@%$+*=<>_]", _same),
        (rf"[{_SYMBOLS}]", _same),
    )
]  # fmt: skip
_ALONE = re.compile(r"[A-Za-z][A-Za-z'\u2019-]+(?:[,!?;:]|(?<!['\u2019-][A-Za-z])\.)?(?=[ \n])(?! \.)")
"""Most of a caption: letters up to a blank, whose tokens do not depend on what is behind the blank."""
_WIDE = "\xa0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u3000"
"""Spaces that may belong to an address, but not behind a plain one."""
_PLAIN = re.compile(r"[A-Za-z]+")
_BEFORE_NUMBERS = tuple(f"{word}." for word in _NUMBERED.split())


def _tokens(text: str, following: str) -> Iterator[str]:
    at, end = 0, len(text)
    text = f"{text}\n{following}\n"
    while at < end:
        alone = _ALONE.match(text, at)
        if alone and not alone[0].lower().endswith(_BEFORE_NUMBERS):
            yield from _tokens_alone(alone[0])
            at = alone.end()
        elif text[at] in " \t\n":
            at += 1
            while text[at] in _WIDE and at < end:
                at += 1
        else:
            token, length = _next(text, at)
            yield token
            at += length


@functools.lru_cache(maxsize=1 << 16)
def _tokens_alone(text: str) -> tuple[str, ...]:
    if _PLAIN.fullmatch(text) and text.lower() not in _IN_TWO.split():
        return (text,)
    found, at = [], 0
    while at < len(text):
        token, length = _next(text + "\n", at)
        found.append(token)
        at += length
    return tuple(found)


def _next(text: str, at: int) -> tuple[str, int]:
    """The token at a place, as it is written, and its length in the text."""
    best, reach = "", 0
    write: Callable[[str], str] = _same
    for rule in _RULES:
        found = rule.pattern.match(text, at)
        if found and found.end() - at > reach:
            best, reach, write = found[found.lastindex or 0], found.end() - at, rule.write
    # What no rule knows, pictographs among it, parts words and is dropped.
    return (write(best), len(best)) if best else ("", 1)
