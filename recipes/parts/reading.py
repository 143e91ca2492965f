r"""What a response, or a known answer as a data set writes it, gives as its answer; and the rule by which it was found.

    read_answer(r"<think>…</think> So it is \boxed{12}.")     # ("12", "boxed")
    read_answer("#### 12")                                    # ("12", "tag")
    read_answer("First … \n**Final Answer**\n\n12 cm")        # ("12 cm", "sentence")
    read_answer("3 + 4 = 7, and\n\n12")                       # ("12", "last line")

What no rule reads has no answer: it is unfinished.
"""

from __future__ import annotations

import json
import re

RULES = ("boxed", "tag", "sentence", "last line")
UNFINISHED, UNDECIDED = "unfinished", "undecided"
OUTCOMES = (*RULES, UNFINISHED, UNDECIDED)  # how an answer was read, or that it was not, or not compared in time
SHORT = 60  # characters that an answer without any mark may have
LONG = 400  # characters beyond which a line is no sentence that says an answer

THOUGHT = r"think|thinking|thought|reasoning"
THOUGHT_END = re.compile(rf"(?i)</(?:{THOUGHT})>|◁/think▷")
THOUGHT_START = re.compile(rf"(?i)<(?:{THOUGHT})>|◁think▷")
SPECIAL = re.compile(r"<\|(?:im_end|endoftext|eot_id|end|return)\|>|</s>|<eos>|<end_of_turn>|<pad>")
BOX = re.compile(r"\\f?boxed\s*\{|\\fbox\s*\{")
TAG = re.compile(r"(?i)<(?P<end>/?)(?P<name>answer|final_answer|ans|conclusion)>|<\|(?P<box>begin|end)_of_box\|>")
DISPLAY = re.compile(r"\$\$\s*([^$]*?)\s*\$\$|\\\[\s*((?:[^\\]|\\[^\]\[])*?)\s*\\\]")
BOLD = re.compile(r"\*\*(?=\S)([^*\n]+?)(?<=\S)\*\*|(?<![\w*])\*(?=\S)([^*\n]+?)(?<=\S)\*(?![\w*])|`([^`\n]+)`")
UNDERLINE = re.compile(r"(?<!\w)__(?=\S)([^_\n]+?)(?<=\S)__(?!\w)|(?<!\w)_(?=\S)([^_\n]+?)(?<=\S)_(?!\w)")
LINE_MARK = re.compile(r"^\s*(?:#{1,6}\s+|>\s+|[*•+]\s+|-\s+(?=[^\d\s\\$.(]))*")  # `- 5` may be minus five
MARKDOWN = " \t*_`"
FENCE = re.compile(r"\A\s*```(?:json)?(?=[\s{])|```\s*\Z")
HASHES = re.compile(r"####\s*(\S.*)")

NAME = r"(?:(?:final|correct|right|best)\s+){0,2}(?:answer|option|choice)s?"
ABOUT = r"(?:\s+(?:to|for|of|in)\s[^.:=?!]{0,60}?)?(?:\s*\([^()]{0,40}\))?"
ABROAD = (  # in other languages
    r"(?:réponse|antwort|respuesta|risposta|resposta|ответ|odpowiedź|đáp án|उत्तर|الجواب|คำตอบ)"
    r"(?:\s+(?:final|finale|correct[ea]|corretta))?"
)
SAID = re.compile(
    rf"(?i)(?:(?<![\w-]){NAME}\b{ABOUT}\s*[*_]*\s*"
    r"(?:(?:is|are|would be|should be|must be)\b(?!n't)\s*:?|[:：=]|->|→|⇒)|"
    r"(?<![\w-])ans\s*[.:=]|(?:答案|答え|正解|正答|정답|답)\s*(?:是|为|為|は|은|는|[:：】])|"
    rf"(?<![\w-]){ABROAD}\s*[*_]*\s*(?:(?:est|ist|lautet|es|è|é|هو|คือ)\b\s*:?|[:：=—]))[\s*_]*"
)
VERB_LAST = re.compile(r"(?<=\S)\s*(?:です|である|(?<=[\dA-Za-z)）」])だ|입니다|이다|이에요|예요)\s*[.。]?$")
HEADING = re.compile(rf"(?i)^(?:the\s+|my\s+)?(?:{NAME}|ans|最终答案|答案|答え|正解|정답|답|{ABROAD})\s*[:：]?$")
NAMED_LAST = re.compile(
    rf"(?i)(?:^|[.,:;]\s+|\b(?:so|thus|therefore|hence)\s+){NAME}\s+(?:[-–—]\s+)?(?P<said>\(?[A-J]\)?)\s*\.?$"
)
TAKEN_LAST = re.compile(  # in the last line, in a sentence of its own
    r"(?:(?:^|[.]\s+)(?i:so|thus|therefore|hence|it['’]s|it is|→|"
    r"i(?:['’]d|['’]ll| would| will)? (?:choose|select|pick|go with))[:,]?\s+|"
    r"(?:^|[,，.。;；:：]\s*)(?:因此|所以|故|我|[应應][该該]?|[本此这這][题題]|(?:正确|正確)?答案)*[选選][择擇]?\s*[:：]?\s*)"
    r"(?P<said>\(?[A-J]\)?)\s*[.。]?$|"
    r"(?:^|[.]\s+)(?P<first>\(?[A-J]\)?) is (?:correct|right|(?:the|my) (?:final )?answer)\.?$"
)
SUPPOSED = re.compile("若|如果|假如|要是")
LEAD_IN = re.compile(
    r"(?i)^(?:therefore|thus|then|hence|simply|clearly|indeed|definitely|likely|probably|most likely|that|equal to|"
    r"given by|(?:the\s+)?(?:option|choice|answer|letter)(?=\s+\(?[A-J]\b))[\s,:]+"
)
REASON = re.compile(
    r"(?i)\s*,?\s+(?:because|since|due to|according to|rather than|instead of)\b|"
    r",\s+(?:which|as|so|not|thus|hence|this)\b|"
    r"\s+(?:as (?:shown|required|expected|the|it|they|we|stated)|so (?:the|that|it|we))\b"
)
SENTENCE_END = re.compile(r"(?<![\s(\[*$][A-J])(?<!^[A-J])[.!?。]\s+(?=[A-Z*\\$(])|。")
CHOSEN = re.compile(
    r"(?i:\b(?:is|be|choose|select|pick|matches|matching|means|corresponds to|corresponding to)\s+(?:the\s+)?"
    r"(?:option|choice|answer)\s+)[(*\[]{0,3}(?P<named>[A-J])\b|"
    r"(?<![\w.])[(*\[]{0,3}(?P<correct>[B-J]|A(?=[)*\]])|(?<=ption )A|(?<=hoice )A)[)*\]]{0,3}\s+"
    r"(?i:is\s+(?:the\s+)?(?:correct|right|best)\b(?:\s+(?:answer|option|choice|one))?)"
)
DENIED = re.compile(r"(?i)\b(?:not|never|no|neither|cannot|wrong|incorrect|unless)\b|n't\b")
DANGLING = re.compile(
    rf"(?i)(?:{NAME}\s+(?:is|are)|[:=,(]|\b(?:and|so|the|of|is|are|a|an|to|then|we|with|that|which|by|in))\s*$"
)
REFUSED = re.compile(r"(?i)\b(?:sorry|unable to|wrong|incorrect|not correct|not right|cannot|can't|isn't|doesn't)\b")
DOUBTS = r"\b(?:wait|hold on|actually|correction|scratch that|my mistake|let me (?:re|double))"
DOUBT = re.compile(rf"(?i){DOUBTS}")
CLAUSE = re.compile(r"(?i)^(?:since|because|as|given|given that)\s[^,]*,\s*")
SO = re.compile(
    r"(?i)^(?:step\s*\w{1,6}\s*:\s*)?"
    r"(?:(?:and|so|thus|therefore|hence|consequently|finally|then|now|in conclusion|overall|this means|that|"
    r"we (?:have|get|find|obtain|conclude|see)|it follows)\b[\s,:]*|[∴⇒]\s*)+"
)
VERB = re.compile(
    r"(?<!\bthat )(?<!\bwhich )\b(?:is|are|was|were|equals|measures|becomes|has|have|contains|costs|(?:will|must|would|"
    r"should) be)\b(?:\s*:|\s+equal to\b)?"
)
LABEL = re.compile(r"(?i)^(?:the\s+)?[a-z][a-z' -]{0,30}:\s*(?=\S)")
LEADING = re.compile(r"(?i)^(?:yes|no|true|false)(?=\s*(?:[,.;:!—–]|$))(?!\s*[,/]\s*(?:yes|no)\b)")
BACK = re.compile(r"(?i)(?:^|[,.;!—–])\s*(yes|no|true|false)\s*[.!]*$")
OPPOSITE = {"yes": "no", "no": "yes", "true": "false", "false": "true"}
LETTER_FIRST = re.compile(r"^[(\[]?[A-J](?:[)\]]|[.:](?=\s|$)|$)")
STEP = re.compile(r"(?i)(?:step|figure|case|part|first|let|note)\b")
JUDGED = re.compile(
    r"(?i)\b(?:too|wrong|cannot)\b|\b(?:is|are)\s+(?:not|right|correct|incorrect|true|false)\b|n['’]t\b"
)
REASONS = re.compile(  # below an answer; what stands within a chain, too, only if nothing is below it
    r"(?i)(?P<of_an_answer>(?:explanation|reason(?:ing|s)?|rationale|justification)\s*:|because\b[^,\n]*\Z)|"
    r"(?:note|step\s*\w{0,6})\s*:[^\n]*\Z"
)
NUMERIC = re.compile(r"(?!\d+[.)]\s)[^\w\\]*(?:[A-Za-z]\s*=[^\w\\]*)?(?:\d|\\[dt]?frac|\\sqrt)")
TITLE = re.compile(
    r"(?i)\b(?:(?<!no )solution|analysis|description|overview|observations?|problem|question|given|answer)\b"
)
VALUE_WORD = re.compile(r"[^\W\d_]{2,}")


def extract_boxed(text: str) -> str | None:
    r"""What the last \boxed{…} holds, braces inside it included; None if there is none, or the text ends within it."""
    starts = [*BOX.finditer(text)]
    if not starts:
        return None
    first, depth = starts[-1].end(), 1
    for brace in re.finditer(r"\\.|[{}]", text[first:], re.DOTALL):  # \{ and \} are no braces
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[first : first + brace.start()].strip()
    return None


def read_answer(text: str) -> tuple[str, str] | None:
    r"""The answer and its rule; None if the text was cut, or answers nothing that a rule finds.

    After the thinking: the last \boxed{…}; an <answer>…</answer>, a JSON object {…, "answer": …} and nothing else, or
    GSM8K's `#### …`; the last sentence that says an answer (`the answer is …`, `Answer:` with the answer below it,
    `Yes, …`, a last sentence `So the angle is …`); all of it if it is one short line, or the last line if that is a
    value. Then a \boxed{…} within the thinking.
    """
    marks = [*THOUGHT_END.finditer(text)]
    thought, rest = (text[: marks[-1].start()], text[marks[-1].end() :]) if marks else ("", text)
    rest = SPECIAL.sub("", rest)
    if THOUGHT_START.search(rest) or (BOX.search(rest) and not extract_boxed(rest)):
        return None
    if boxed := extract_boxed(rest):
        return boxed, "boxed"
    tagged, torn = _tagged(rest)
    if tagged:
        return tagged
    if torn:
        return None
    if keyed := _keyed(rest):
        return keyed, "tag"
    lines = _lines(rest)
    if not lines:
        boxed = extract_boxed(thought)
        return (boxed, "boxed") if boxed else None
    if match := HASHES.fullmatch(rest.strip().rpartition("\n")[2].strip()):
        return _bare(match[1]), "tag"
    if said := _said(lines):
        return said
    if _is_echo(lines):
        leading = _leading(lines[0])
        return (leading, "sentence") if leading else None
    return _explained(lines) or _alone(lines) or _concluded(lines)


def known_answer(text: str) -> str:
    """What a data set's answer knows, chain in front or not; where no mark stands, all that follows the thinking."""
    reading = read_answer(text)
    if reading and (reading[1] in ("boxed", "tag") or _said(_lines(THOUGHT_END.split(SPECIAL.sub("", text))[-1]))):
        return reading[0]
    rest = THOUGHT_END.split(text)[-1].strip()
    if reading and "\n" in rest:
        return reading[0]
    return "" if THOUGHT_START.search(rest) else SPECIAL.sub("", rest).strip()


def readings(answer: str) -> list[str]:
    """An answer, and what it says where it is itself a sentence: `The correct answer is B` in a box or a tag."""
    lines = _lines(answer)
    if not lines:
        return [answer]
    texts = [answer]
    if boxed := extract_boxed(answer):
        texts.append(boxed)
    stated = _said(lines)
    if stated:
        texts.append(stated[0])
    elif len(lines) == 1:
        if leading := _leading(lines[0]):
            texts.append(leading)
        elif concluded := _conclusion(lines[0]):
            texts.append(concluded)
    elif LETTER_FIRST.fullmatch(lines[0]) or HEADING.fullmatch(lines[0]):
        texts.append(lines[-1])
    return [*dict.fromkeys(texts)]


def _tagged(rest: str) -> tuple[tuple[str, str] | None, bool]:
    """What stands in the last tag, with its rule, and whether a tag is open at the end."""
    opened, tagged = None, None
    for tag in TAG.finditer(rest):
        if tag["end"] or tag["box"] == "end":
            inside = rest[opened.end() : tag.start()].strip() if opened else ""
            tagged, opened = ((inside, "boxed" if tag["box"] else "tag") if inside else tagged), None
        else:
            opened = tag
    return tagged, opened is not None


def _keyed(rest: str) -> str | None:
    """12 of `{"answer": "12"}`, fenced or not; nothing may stand beside it, as where it is an example or code."""
    text = FENCE.sub("", rest).strip()
    if not (text.startswith("{") and text.endswith("}")):
        return None
    try:
        found = json.loads(text, parse_int=str, parse_float=str)
    except (ValueError, RecursionError):
        return None
    key, answer = [*found.items()][-1] if found else ("", None)  # in front of a unit, or a correction, it is not all
    named = key in ("answer", "final_answer", "final answer") and isinstance(answer, str | bool)
    return str(answer).strip() if named else None


def _lines(text: str) -> list[str]:
    """Lines that say something, without Markdown; display mathematics in one line."""
    text = DISPLAY.sub(lambda m: f" ${' '.join((m[1] or m[2] or '').split())}$ ", text)
    lines = (_bare(line) for line in text.splitlines())
    return [line for line in lines if line.strip("-=* $")]


def _bare(line: str) -> str:
    line = BOLD.sub(lambda m: m[1] or m[2] or m[3], " ".join(line.split()))
    line = UNDERLINE.sub(lambda m: m[1] or m[2], line)
    return LINE_MARK.sub("", line).rstrip(MARKDOWN).strip()


def _said(lines: list[str]) -> tuple[str, str] | None:
    """What the last `answer is …` says, or else `I choose B` at the end; ("", …) never: then the text was cut."""
    for number in range(len(lines) - 1, -1, -1):
        line, below = lines[number], lines[number + 1 : number + 3]  # two tell whether the next one is the last
        chosen = next((m for m in reversed([*CHOSEN.finditer(line)]) if not DENIED.search(_sentence_of(line, m))), None)
        letter = chosen and (chosen["named"] or chosen["correct"])
        marks = [*SAID.finditer(line)]
        if not marks:
            if HEADING.fullmatch(line) and below and (_is_value(below[0]) or len(below) == 1):
                return _clause(below[0]), "sentence"
            if letter:
                return letter, "sentence"
            if named := NAMED_LAST.search(line):
                return named["said"], "sentence"
            continue
        answer = line[marks[-1].end() :].rstrip(MARKDOWN).strip(" :")
        if not answer.strip(".$ "):
            if below and (_is_value(below[0]) or len(below) == 1):
                return _clause(below[0]), "sentence"
            continue
        if DOUBT.search(answer) or any(DOUBT.search(line) for line in lines[number + 1 :]):
            continue
        answer = _clause(answer)
        if letter and chosen.start() > marks[-1].start() and not LETTER_FIRST.match(answer):
            return f"({letter}) {answer}", "sentence"
        return (answer, "sentence") if answer else None
    taken = TAKEN_LAST.search(lines[-1]) if lines and not SUPPOSED.search(lines[-1]) else None
    return (taken["said"] or taken["first"], "sentence") if taken else None


def _alone(lines: list[str]) -> tuple[str, str] | None:
    """One short line, or a value in the last of several."""
    last = lines[-1]
    if (
        HEADING.fullmatch(last)
        or DANGLING.search(last)
        or (REFUSED.search(last) and re.search(NAME, last, re.IGNORECASE))
    ):
        return None
    if len(lines) == 1:
        return (last, "last line") if len(last) <= SHORT or " " not in last else None
    return (last.lstrip("= "), "last line") if _is_value(last) else None


def _is_echo(lines: list[str]) -> bool:
    """Whether a text ends in its options from A on, all bare letters or all with short texts, and so in none that it
    chose. `A. 45 is too small.` is no option, but says which one it is not."""
    letters = "".join(line.lstrip("([")[0] if LETTER_FIRST.match(line) else " " for line in lines)
    last = letters.rpartition(" ")[2]
    if len(last) < 2 or not "ABCDEFGHIJ".startswith(last):
        return False
    echo = lines[-len(last) :]
    alike = len({len(line.strip("()[].: ")) == 1 for line in echo}) == 1
    return alike and all(len(line) <= SHORT and not JUDGED.search(line) for line in echo)


def _explained(lines: list[str]) -> tuple[str, str] | None:
    """12 or `Blue` in front of `Explanation: …`, unless a conclusion follows: a word may also be a title."""
    first, last = lines[0], lines[-1]
    reasons = REASONS.match("\n".join(lines[1:]))
    if not reasons or not _is_value(first) or TITLE.search(first) or (len(lines) > 2 and _is_value(last)):
        return None
    if SO.match(SENTENCE_END.split(last)[-1]):
        return None
    signs = bool(NUMERIC.match(first)) + bool(reasons["of_an_answer"])
    number_follows = re.search(r"\d", _conclusion(last) or "")
    return (first, "sentence") if signs == 2 or (signs and not number_follows) else None


def _concluded(lines: list[str]) -> tuple[str, str] | None:
    """`Yes, …` or `B. 45°` in front of reasons; or what the last sentence says."""
    if leading := _leading(lines[0]):
        return leading, "sentence"
    letters = [line for line in lines if LETTER_FIRST.match(line)]
    if len(letters) == 1 and letters[0] == lines[0] and len(lines[0]) <= SHORT:
        return lines[0], "sentence"
    concluded = _conclusion(lines[-1])
    return (concluded, "sentence") if concluded else None


def _leading(line: str) -> str | None:
    """Yes of `Yes, …`, unless it is taken back: `Yes, but actually no`."""
    leading, doubt = LEADING.match(line), DOUBT.search(line)
    back = BACK.search(line[doubt.end() :]) if doubt else None
    if not leading or (back and back[1].casefold() == OPPOSITE[leading[0].casefold()]):
        return None
    return leading[0]


def _conclusion(line: str) -> str | None:
    """12 of `Therefore, the area is 12.`, with one verb in it: of two, nobody knows which one counts."""
    if len(line) > 10 * LONG or DANGLING.search(line):
        return None
    sentence = SENTENCE_END.split(line)[-1].strip()
    sentence = CLAUSE.sub("", sentence)
    so = SO.match(sentence)
    sentence = CLAUSE.sub("", sentence[so.end() :] if so else sentence)
    sentence = _clause(sentence)
    if len(sentence) > LONG or DENIED.search(VERB.split(sentence)[0]) or re.search(r"(?i)\b(?:if|when)\b|\?", sentence):
        return None
    verbs = [*VERB.finditer(sentence)]
    if len(verbs) == 1 and verbs[0].start():
        subject, predicate = sentence[: verbs[0].start()], sentence[verbs[0].end() :].strip(" :")
        if re.search(r"[=<>]", subject) or not predicate:
            return None
        return LEAD_IN.sub("", predicate)
    if not verbs and so and re.search(r"[=≈]|\\approx", sentence):
        return sentence
    if not verbs and (label := LABEL.match(sentence)):
        return sentence[label.end() :]
    return None


def _clause(text: str) -> str:
    """Up to the end of the sentence, without the reasons that follow."""
    text = text.strip()
    text = SENTENCE_END.split(text)[0]
    text = REASON.split(text)[0] or text
    return VERB_LAST.sub("", LEAD_IN.sub("", text)).strip()


def _sentence_of(line: str, match: re.Match) -> str:
    start = max((m.end() for m in SENTENCE_END.finditer(line) if m.end() <= match.start()), default=0)
    return SENTENCE_END.split(line[start:])[0]


def _is_value(line: str) -> bool:
    """Whether a line can be nothing but an answer: a letter, a number, a formula, or up to three words."""
    if len(line) > SHORT or line[-1] in ":=+-,([{<" or STEP.match(line):
        return False
    if LETTER_FIRST.match(line):
        return True
    words = VALUE_WORD.findall(re.sub(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}|\\[A-Za-z]+", "", line))
    return len(words) <= (3 if not re.search(r"[.!?]\s", line) else 0)
