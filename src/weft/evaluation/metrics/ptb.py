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


def tokenize(text: str) -> str:
    """The words of a caption, joined by single blanks.

    A few words hold a space of their own, which does not break (`1 1/2`); `str.split` splits there, as in the original.
    """
    return " ".join(word for word in tokens(text.replace("\n", " ")) if word not in REMOVED)


def tokens(text: str) -> list[str]:
    """All tokens of a line, in lower case, punctuation included."""
    return [part.lower() for token in _tokens(text) for part in token.split(" ") if part]


_APOS = "(?:['\x92\u2019]|&apos;)"
_MARKS = "\u0300-\u036f\u0483-\u0487\u0591-\u05c7\u064b-\u065e\u0900-\u0963\u0966-\u0e3a\u0e47-\u0e4e\u0eb1-\u0ecd"
_NUMERALS = "\xb2\xb3\xb9\xbc-\xbe\u2070-\u209c\u2150-\u218b\u2460-\u24ff\u2776-\u2793"
_L = rf"(?:(?![{_NUMERALS}])[^\W\d_\U00010000-\U0010ffff]|[{_MARKS}\xad])"
_D = r"[\d\xad]"
_LD = rf"(?:{_L}|\d)"
_SPACE = "[ \t\xa0\u2000-\u200a\u3000]"
_HYPHEN = "[-_\u058a\u2010\u2011]"
_AMP = "(?:&|&amp;)"
_WORD = rf"{_L}{_LD}*(?:[.!?]{_L}{_LD}*)*"
_ELIDED = rf"(?:[dDoOlL]{_APOS}{_LD})?"
_HYPHENED = rf"{_ELIDED}{_LD}+(?:{_HYPHEN}{_ELIDED}{_LD}+)*"
_AMPED = rf"[A-Z]+(?:(?:[+]|{_AMP})[A-Z]+)+"
_WITHIN = rf"(?:[A-HJ-XZn]{_APOS}{_L}{_L}{_LD}*|{_L}+[aeiouyAEIOUY]{_APOS}[aeiouAEIOU]{_L}*)"
_NUMBER = rf"(?:{_D}*(?:[.:,\u066b\u066c]{_D}+)+|{_D}+)"
_AUX = rf"{_APOS}(?:[msdMSD]|[rR][eE]|[vV][eE]|[lL][lL])"
_SYMBOLS = (
    r"\xa1\xa5-\xa9\xac\xae-\xb4\xb6-\xb9\xbf\xd7\xf7\u2016\u2017\u201a\u201e-\u2023\u2030-\u2038\u203b"
    r"\u203e-\u2042\u2044\u2070-\u208e\u20a4\u2100-\u214f\u2155-\u215e\u2190-\u2bff\u3001\u3002\u3012\u30fb"
    r"\u061b\u060c\u061f\u06d4\u0964\u0965\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\uffe0\uffe1"
    r"\uffe5\uffe6"
)
"""Each a token of its own."""
_URL_END = r"[^ \t\xa0\n\"<>|.!?(){},-]"
_DOMAIN = r"[^ \t\xa0\n\"`'<>|.!?(){},-_$]+\."
"""`,-_` is a range: no digits, capitals, slashes or colons."""
_PATH = rf"(?:/[^ \t\xa0\n\"<>|()]+{_URL_END})?"
_ATTRIBUTE = (
    rf"{_SPACE}+[A-Za-z][A-Za-z0-9_:.-]*(?:{_SPACE}*={_SPACE}*(?:'[^']*'|\"[^\"]*\"|[A-Za-z][A-Za-z0-9_:.-]*))?"
)

_ABBREVIATIONS = """
    adj adm adv al ala alex apr ariz assn assoc asst atty attys aug ave bancorp bhd bldg blvd brig bros calif capt cf
    cie cmdr co col colo comdr conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext feb fla fri ft ga
    gen gov govs hon inc ind insp intl invt jan jos jr jul jun kan kans ky lieut lt ltd maj mar md messrs mich minn mlle
    mme mo mon mont mr mrs ms msgr mt natl neb nev nov oct okla penn pfc ph plc pres prof profs pvt rd rep reps rev rt
    sen sens sep sept seq sfc sgt spc sq sr st ste supt supts sys tel tenn thu thurs treas tue tues univ va vs vt wed
    wis wisc wm wyo
"""
_CAPITAL_ABBREVIATIONS = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash"
"""Small letters make these words."""
_NUMBERED = "art ca fig figs no nos op pp prop"
"""Abbreviations before a number only."""
_NOT_CAPITALS = "[mM]fg [mM]tg [pP]pte [pP]pty [pP]tes? [pP]tys?"
_STARTERS = """
    A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Now Once One
    Other Our She Since So Some Such That The Their Then There These They This We What When While Yet You
"""
"""Words that begin a sentence: a single letter before them ends one."""
_FILES = """
    jpe?g png gif bmp pdf txt html? xml exe docx? ppt zip tar gz py java c h cpp php mp3 wav mov bat pl dll jar class ps
"""
"""Ends of file names."""
_URL_TEXT = r"[^ \t\xa0\n\"<>|()"


def _any_of(words: str) -> str:
    return "(?:" + "|".join(sorted(words.split(), key=len, reverse=True)) + ")"


class _Rule(NamedTuple):
    pattern: re.Pattern[str]
    """What is matched; group 1, where there is one, is the token, and the rest its context."""
    write: Callable[[str], str]
    """The token as it is written; blanks part tokens."""


def _same(token: str) -> str:
    return token


def _straight(token: str) -> str:
    return re.sub(_APOS, "'", token)


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


def _split_at(place: int) -> Callable[[str], str]:
    return lambda token: f"{token[:place]} {token[place:]}"


def _always(written: str) -> Callable[[str], str]:
    return lambda _: written


def _phone(token: str) -> str:
    return _round(_joined(token))


_RULES = [
    _Rule(re.compile(pattern), write)
    for pattern, write in (
        (r"(?i:cannot|gonna|gotta|lemme|gimme|wanna)", _split_at(3)),
        (r"(?i:'tis|'twas)", _split_at(2)),
        (rf"<(?:[!?][A-Za-z-][^>]*|/[A-Za-z][A-Za-z0-9_:.-]*{_SPACE}*|[A-Za-z][A-Za-z0-9_:.-]*(?:{_ATTRIBUTE})*"
         rf"{_SPACE}*/?{_SPACE}*)>", _joined),
        (rf"({_WORD})(?:{_AUX})", _soft),
        (rf"({_L}*[A-MO-Za-mo-z\xc0-\xff])[nN]{_APOS}[tT]", _soft),
        (rf"[nN]{_APOS}[tT]", _straight),
        (rf"({_AUX})[^A-Za-z]", _straight),
        (_WORD, _soft),
        (rf"{_APOS}[nN]{_APOS}?|[lLdDjJ]{_APOS}|(?i:dunkin|somethin|ol){_APOS}|(?i:{_APOS}(?:em|cause|till?))", _same),
        (rf"{_APOS}[2-9]0s|(?i:e{_APOS}er|c{_APOS}mon|c{_APOS}est|cap{_APOS}n|ev{_APOS}ry|li{_APOS}l|nat{_APOS}l)",
         _same),
        (_WITHIN, _same),
        (rf"([yY]{_APOS}){_L}", _same),
        (rf"({_APOS}\d\d)[ \t\n]", _same),
        (rf"https?://{_URL_TEXT}]+{_URL_END}", _same),
        (rf"(?:www\.(?:{_URL_TEXT}.!?{{}},]+\.)+[a-zA-Z]{{2,4}}|(?:{_DOMAIN})+(?i:com|net|org|edu)){_PATH}", _same),
        (rf"(?:&lt;|<)?[a-zA-Z0-9]{_URL_TEXT}{{}}]*@(?:{_URL_TEXT}{{}}.]+\.)*{_URL_TEXT}{{}}.]+(?:&gt;|>)?", _same),
        (rf"#{_L}+|@[A-Za-z_][A-Za-z_0-9]*", _same),
        (r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}", _same),
        (rf"[-+]?{_NUMBER}", _soft),
        (r"[\u207a\u207b\u208a\u208b]?(?:[\u2070\xb9\xb2\xb3\u2074-\u2079]+|[\u2080-\u2089]+)", _same),
        (r"(?:\d{1,4}[- \xa0])?\d{1,4}(?:\\?/|\u2044)\d{1,4}", _joined),
        (r"[A-Za-z0-9][A-Za-z0-9.,]*(?:-[A-Za-z0-9]+)*-(?:[A-Za-z]\.){2,}", _same),
        (rf"[A-Za-z0-9][A-Za-z0-9.,]*(?:-[A-Za-z0-9]+)+|\d+(?:\.\d+)*\.[xX](?!{_LD})", _same),
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
        (rf"({_LD}+\.(?i:{_any_of(_FILES)}))[ \t\n.,?!]", _same),
        (r"(?:Canada|Sino|Korean|EU|Japan|non)-U\.S\.", _same),
        (rf"[A-Za-z](?:\.[A-Za-z])+\.?-[A-Za-z]+{_LD}*(?:-{_LD}+)*", _same),
        (rf"([A-Za-z])\.{_SPACE}+(?:{_any_of(_STARTERS)}|{_any_of(_STARTERS.upper())}){_SPACE}", _same),
        (rf"(?i:ph|ed)\.[dD]\.|(?i:{_any_of(_ABBREVIATIONS)})\.|{_any_of(_CAPITAL_ABBREVIATIONS)}\."
         rf"|{_any_of(_NOT_CAPITALS)}\.", _same),
        (rf"((?i:{_any_of(_NUMBERED)})\.){_SPACE}*\d", _same),
        (rf"((?:{_WORD}|{_HYPHENED}|{_AMPED}|{_WITHIN})\.)[,;:]", _soft),
        (r"(?:\(\d{2,3}\)[ \xa0]?|(?:\+\+?)?(?:\d{2,4}[- \xa0])?\d{2,4}[- \xa0])\d{3,4}[- \xa0]?\d{3,5}"
         r"|(?:(?:\+\+?)?\d{2,4}\.)?\d{2,4}\.\d{3,4}\.\d{3,5}", _phone),
        ("(')[A-Za-z][^ \t\xa0\n]", _always("'")),
        (_AUX, _straight),
        (r"([<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]])[^A-Za-z0-9]", _round),
        (r"[-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)", _round),
        (_HYPHENED, _soft),
        (_AMPED, lambda token: token.replace("&amp;", "&")),
        (r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}", _same),
        (r"\.{3,5}|\u2026", _always("...")),
        (r"[?!]+", _same),
        (r"-{2,4}|[\x96\x97\u2013\u2014\u2015]", _always("--")),
        (r"-{5,}|\*+|_+|@+|[~^]", _same),
        (r"&nbsp;", _always("")),
        (r"(?i:&amp;)", _always("&")),
        (r"(?i:&lt;)", _always("<")),
        (r"(?i:&gt;)", _always(">")),
        (r"[\"\x93\x94\u201c\u201d\xab\xbb]|&quot;|``|''", _always("''")),
        (r"['\u2019\u2018\u201b\u2039\u203a`\x91\x92]|&apos;", _always("'")),
        (r"&#\d+;|<<|>>|[cC]\+\+|[cCfF]#|(?:\\\*)+", _same),
        (r"[]()\[{}]", _brackets),
        (r"-(?i:[lr][rsc]b)-", _same),
        (r"[-.,:;/\\|&@%$+*=<>_]", _same),
        (rf"[{_SYMBOLS}]", _same),
    )
]  # fmt: skip
_ALONE = re.compile(r"[A-Za-z][A-Za-z'\u2019-]+[.,!?;:]?(?=[ \n])")
"""Most of a caption: letters up to a blank, whose tokens do not depend on what is behind the blank."""
_PLAIN = re.compile(r"[A-Za-z]+")
_SPLIT = {"cannot", "gonna", "gotta", "lemme", "gimme", "wanna"}
_BEFORE_NUMBERS = {f"{word}." for word in _NUMBERED.split()}


def _tokens(text: str) -> Iterator[str]:
    text += "\n"
    at = 0
    while at < len(text):
        alone = _ALONE.match(text, at)
        if alone and alone[0].lower() not in _BEFORE_NUMBERS:
            yield from _tokens_alone(alone[0])
            at = alone.end()
        elif text[at] in " \n":
            at += 1
        else:
            token, length = _next(text, at)
            yield token
            at += length


@functools.lru_cache(maxsize=1 << 16)
def _tokens_alone(text: str) -> tuple[str, ...]:
    if _PLAIN.fullmatch(text) and text.lower() not in _SPLIT:
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
            best, reach, write = found[1 if rule.pattern.groups else 0], found.end() - at, rule.write
    # What no rule knows, pictographs among it, parts words and is dropped.
    return (write(best), len(best)) if best else ("", 1)
