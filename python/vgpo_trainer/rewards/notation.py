"""Answers without what is only notation: markup, LaTeX, Unicode's look-alikes, units, the spelling of numbers.

Every pattern here takes time linear in the text, whatever a model writes.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_SUPERSCRIPT = re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+")
_FRACTION_CHARACTER = re.compile(r"[¼½¾⅐-⅞]")
_DASHES = re.compile("[\u2010-\u2015\u2212\ufe58\ufe63]")
_CHARACTERS = str.maketrans(
    {"\u2044": "/", "\u00d7": "*", "·": "*", "⋅": "*", "÷": "/", "≤": "<=", "≥": ">=", "≠": "!=", "π": " pi "}
    | {"“": '"', "”": '"', "\u2018": "'", "\u2019": "'", "º": "°", "∞": " infty ", "。": ".", "、": ","}
)

# Commands that say how their argument looks, or nothing at all.
_BRACES = re.compile(
    r"(?P<style>\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt|bb|cal)|mbox|hbox|fbox|emph|boldsymbol|bm"
    r"|boxed|operatorname\*?|displaystyle|textstyle)(?![A-Za-z])\s*\{?)|\\[{}]|[{}]"
)
_SPACES = re.compile(r"\\[,;:!> ]|\\q?quad(?![A-Za-z])|(?<=[0-9A-Za-z}])~")  # "~5" is about 5
_SIZES = re.compile(r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\.?")
_DELIMITERS = re.compile(r"(?<!\\)\$+|\\[()\[\]]")
_FRACTION = re.compile(r"\\[dtc]?frac(?![A-Za-z])\s*")
_DEGREES = re.compile(r"\^?\s*(?:\{\s*)?(?:\\circ|\\degree)(?![A-Za-z])(?:\s*\})?")
_OPERATORS = {
    r"\\(?:times|cdot|ast)": "*",
    r"\\div": "/",
    r"\\leq?(?:slant)?": "<=",
    r"\\geq?(?:slant)?": ">=",
    r"\\neq?": "!=",
    r"\\l?dots": "...",
    r"\\(?:pi|infty)": None,
}
_COMMANDS = [(re.compile(rf"{name}(?![A-Za-z])"), value) for name, value in _OPERATORS.items()]
_ESCAPED = re.compile(r"\\([%$#&_])")
_ATOM = re.compile(r"-?\w+|sqrt\([^()]*\)")
_ROOT_CHARACTER = re.compile(r"√\s*([0-9.]+|[A-Za-z])")
_ROOT = re.compile(r"\\?sqrt\s*(?:\{([^{}]*)\}|\(([^()]*)\)|([0-9A-Za-z]))")
_POWER_SPACES = re.compile(r"\s*\^\s*")
_SIMPLE_BRACES = re.compile(r"([_^])\s*\{\s*([^{}\s]+)\s*\}")
_BOLD = re.compile(r"\*\*([^*]+)\*\*|__([^_]+)__")

_SURROUNDINGS = " \"'`*_#"
_ENDINGS = _SURROUNDINGS + ".,;:"  # "5?" is a guess, "5!" is 120
_OPERATOR_SPACES = re.compile(r"\s*([-+*/^=<>|!]+)\s*")
_BRACKET_SPACES = re.compile(r"(?<=[(\[{])\s+|\s+(?=[)\]}])")
_PRODUCT_SPACES = re.compile(r"(?<=[0-9])\s+(?=[a-z(])")
_COMMA_SPACES = re.compile(r"\s*([,;])\s*")

# Digits of a number: more than this is a text to compare, so that nothing has to be computed with it.
_LONGEST_NUMBER = 100
_LARGEST_EXPONENT = 400
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_DECIMAL = re.compile(
    rf"(?P<sign>[-+]?)(?P<currency>[$€£¥]?)\ ?(?P<digits>{_DIGITS}(?:\.[0-9]*)?|\.[0-9]+)"
    rf"(?:e(?P<exponent>[-+]?[0-9]{{1,4}})|\ ?\*\ ?10\^\{{?(?P<power>[-+]?[0-9]{{1,4}})\}}?)?(?P<unit>\D.*)?",
    re.DOTALL,
)
_RATIO = re.compile(
    rf"(?P<sign>[-+]?)\ ?(?:(?P<whole>{_DIGITS})\ )?(?P<top>{_DIGITS})\ ?/\ ?(?P<bottom>{_DIGITS})(?P<unit>\D.*)?",
    re.DOTALL,
)
_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
_NUMBER_WORDS = {word: Fraction(value) for value, word in enumerate(_WORDS.split())}

# What may follow a number and leave its value alone: "5 million" and "5 dozen" are other numbers. A single letter is a
# unit behind a space only: "5m" may be a product.
_LENGTHS = (
    "mm cm dm m km in inch inches ft foot feet yd yard yards mi mile miles meter meters metre metres centimeter "
    "centimeters centimetre centimetres millimeter millimeters millimetre millimetres kilometer kilometers kilometre "
    "kilometres"
)
_OTHER_UNITS = (
    "% percent ° deg degree degrees °c °f g kg mg gram grams kilogram kilograms lb lbs pound pounds oz ounce ounces l "
    "ml liter liters litre litres s sec secs second seconds min mins minute minutes h hr hrs hour hours day days week "
    "weeks month months year years unit units $ dollar dollars usd € euro euros £ ¥ cent cents km/h kph mph m/s hz kwh"
)
_UNITS = (
    {*_LENGTHS.split(), *_OTHER_UNITS.split()}
    | {f"{length}{power}" for length in (*_LENGTHS.split(), "unit", "units") for power in ("^2", "^3")}
    | {f"{kind} {length}" for length in (*_LENGTHS.split(), "unit", "units") for kind in ("square", "sq", "cubic")}
)


class Number(NamedTuple):
    """A number as an answer gives it: its exact value, and its unit, empty without one."""

    value: Fraction
    unit: str


def bare(text: str) -> str:
    r"""An answer without markup and LaTeX's dress, its letters' case kept: ``$\text{(B)}$`` is ``(B)``."""
    plain = _SUPERSCRIPT.sub(lambda found: f"^{found.group().translate(_SUPERSCRIPTS)}", text)
    plain = _FRACTION_CHARACTER.sub(lambda found: f" {unicodedata.normalize('NFKC', found.group())} ", plain)
    plain = _DASHES.sub("-", unicodedata.normalize("NFKC", plain)).translate(_CHARACTERS)
    plain = _ROOT_CHARACTER.sub(r"\\sqrt{\1}", plain).replace("√", r"\sqrt")
    plain = "".join(letter for letter in plain if unicodedata.category(letter) != "Cf")
    plain = re.sub(r"\{,\}|(?<=[0-9])\\[,!](?=[0-9]{3})", ",", plain)
    plain = _DELIMITERS.sub(" ", plain)
    plain = _SIZES.sub("", _SPACES.sub(" ", plain))
    plain = _without_style(plain)
    plain = _DEGREES.sub("°", plain)
    for command, value in _COMMANDS:
        plain = command.sub(f" {value} " if value else lambda found: f" {found.group()[1:]} ", plain)
    # Roots stand in fractions, and fractions in roots.
    plain = _roots(_fractions(_roots(plain)))
    plain = _ESCAPED.sub(r"\1", _SIMPLE_BRACES.sub(r"\1\2", _POWER_SPACES.sub("^", plain)))
    plain = _BOLD.sub(lambda found: found[1] or found[2], plain)
    return " ".join(plain.split()).lstrip(_SURROUNDINGS).rstrip(_ENDINGS)


def normal(text: str) -> str:
    """The form of a bare answer in which two are compared as texts: case and spacing at operators do not count."""
    plain = _COMMA_SPACES.sub(r"\1 ", _OPERATOR_SPACES.sub(r"\1", text.casefold()))
    return " ".join(_PRODUCT_SPACES.sub("", _BRACKET_SPACES.sub("", plain)).split())


def number(text: str) -> Number | None:
    """The number that a bare answer is, or ``None``: a decimal, a fraction, a mixed number, a word up to twenty."""
    plain = text.casefold()
    if plain in _NUMBER_WORDS:
        return Number(_NUMBER_WORDS[plain], "")
    if len(plain) > 2 * _LONGEST_NUMBER:
        return None
    ratio = _RATIO.fullmatch(plain)
    if ratio is not None:
        whole, top, bottom = (int((ratio[part] or "0").replace(",", "")) for part in ("whole", "top", "bottom"))
        if bottom == 0 or not _is_unit(ratio["unit"]):
            return None
        value = whole + Fraction(top, bottom)
        return Number(-value if ratio["sign"] == "-" else value, _unit(ratio["unit"]))
    decimal = _DECIMAL.fullmatch(plain)
    if decimal is None or len(decimal["digits"]) > _LONGEST_NUMBER:
        return None
    exponent = int(decimal["exponent"] or decimal["power"] or 0)
    if abs(exponent) > _LARGEST_EXPONENT or not _is_unit(decimal["unit"]):
        return None
    value = Fraction(decimal["digits"].replace(",", "").rstrip(".")) * Fraction(10) ** exponent
    return Number(-value if decimal["sign"] == "-" else value, _unit(decimal["unit"] or decimal["currency"]))


def _unit(text: str | None) -> str:
    """A unit's one spelling; a dollar sign is none, since it marks mathematics as well."""
    unit = (text or "").strip().rstrip(".").strip("$")
    return {"percent": "%", "degree": "°", "degrees": "°", "deg": "°"}.get(unit, unit)


def _is_unit(text: str | None) -> bool:
    if text is None:
        return True
    unit = text.strip().rstrip(".")
    return unit in _UNITS and (text[0] == " " or len(unit) > 1 or not unit.isalpha())


def _without_style(text: str) -> str:
    """Leave out commands that say how their argument looks, with the argument's braces; a unit stays apart."""
    parts: list[str] = []
    dropped: list[bool] = []  # of each open brace, whether it is a command's
    end = 0
    for found in _BRACES.finditer(text):
        parts.append(text[end : found.start()])
        end = found.end()
        token = found.group()
        if found["style"]:
            parts.append(" ")
            if token.endswith("{"):
                dropped.append(True)
        elif token == "}" and dropped and dropped.pop():
            parts.append(" ")
        else:
            parts.append(token)
            if token == "{":
                dropped.append(False)
    return text if any(dropped) else "".join([*parts, text[end:]])


def _roots(text: str) -> str:
    return _ROOT.sub(lambda found: f" sqrt({found[1] or found[2] or found[3] or ''})", text)


def _fractions(text: str) -> str:
    r"""Write ``\frac{a}{b}``, ``\frac12`` as ``a/b``, with brackets around what is more than a number or a name."""
    for _ in range(8):  # nested ones from the last, which holds no other
        found = list(_FRACTION.finditer(text))
        if not found:
            break
        begin, end = found[-1].span()
        parts = []
        for _ in range(2):
            close = closing(text, end)
            if close is not None:
                parts.append(text[end + 1 : close].strip())
                end = close + 1
            elif end < len(text) and text[end].isalnum():
                parts.append(text[end])
                end += 1
        if len(parts) < 2:
            break
        top, bottom = (part if _ATOM.fullmatch(part) else f"({part})" for part in parts)
        # A factor stays apart: "2\frac12" is a mixed number.
        apart = " " if text[:begin].rstrip()[-1:].isalnum() else ""
        text = f"{text[:begin]}{apart}{top}/{bottom} {text[end:]}"
    return text


def closing(text: str, begin: int) -> int | None:
    """Where the brace that opens at ``begin`` closes, or ``None``: no brace there, or one that stays open."""
    if text[begin : begin + 1] != "{":
        return None
    depth = 0
    for position in range(begin, len(text)):
        if text[position] in "{}" and text[position - 1 : position] != "\\":
            depth += 1 if text[position] == "{" else -1
            if depth == 0:
                return position
    return None
