"""Building LongVideo-Reason (section 3 of the paper): from raw videos to questions with reasoning.

    DIR/**/*.mp4                                                         OUT/videos.jsonl
      | equal clips of about 10 s, 8 frames of each as JPEG; captioner   OUT/captions.jsonl
    "[00:10-00:20] A man opens the box ..."
      | LLM, one prompt for each category                                OUT/drafts.jsonl
    question, options (or none), answer, reasoning about captions
      | LLM again: the reasoning now speaks of what is seen              OUT/rows.jsonl
    rows of data.py, 1/3 and 2/3 of them, no video in both               OUT/sft.jsonl, OUT/rl.jsonl

Captioner and LLM are OpenAI-compatible servers (`vllm serve MODEL`). Each arrow is a stage of
kit/work.py: the same command goes on where a killed run stopped, to the same bytes, as what is
decided here (form of a question, order of options, split) hangs on hashes of keys, not on the order
of replies. A reply that fails a check is asked for again; after --tries its key is lost, with the
reason in OUT/lost.jsonl. Nothing is repaired or replaced: what an LLM got wrong in form is not
right in fact.

What differs from the paper, which does not publish its prompts:
    DEVIATION 1: the prompts are ours. Options are shuffled here, as LLMs favour some letters; so
        reasoning names options by their texts, and ends with the text of the right one.
    DEVIATION 2: as many questions of each category; the paper's shares are 36, 36, 4, 24 %.

Run:  python -m kit.build --videos DIR --llm URL --captioner URL --out OUT
Check this file alone:  pytest tests/test_build.py
"""

import base64
import hashlib
import io
import itertools
import json
import os
import re
import string
import sys
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from data import DataError, Medium, parse_row
from kit.chat import Chat, ReplyError, ServerError
from kit.decode import Loader
from kit.options import parse
from kit.ranks import reported
from kit.work import Folder

ENDINGS = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v")
SFT_SHARE = 1 / 3  # of the rows
TEMPERATURE = 0.6
MIN_WORDS = 20  # of a reasoning
GO_ON = "the same command goes on where it stopped"
CATEGORIES = {
    "temporal": "time: the order of events, how long they last, what has changed between them",
    "goal": "purpose: what somebody tries to achieve, or what an action turns out to be for",
    "spatial": "space: where people and things are to each other, how and where to they move",
    "plot": "the story: why things happen and what follows, turning points, the point of it all",
}
CAPTION = """These {n} frames are in order, from {span} of a longer video. Describe in one paragraph
of at most 150 words what is seen and what happens: people and their looks, things, who or what is
where, actions in their order, text that is shown. Write only what can be seen, and write about the
video, not about frames or images."""
QUESTION = """Here are captions of a whole video, part by part, with their times (minutes:seconds).

{captions}

Write one question about this video. Its subject is {about}. What is seen near {near} plays a role.
- Answering it takes several parts of the video that are far apart. Neither one part nor common
  sense without the video is enough. Yet the captions settle the answer beyond doubt.
- The question is one line, without options and without a hint at the answer. Those who answer see
  the video: call people and things by their looks, never mention captions, transcripts or clips.
- {form}
- The reasoning goes step by step, with times, from what happens in the video to the answer. Options
  that are wrong are ruled out by their words; it never calls an option by a letter or position.

Reply with one JSON object and nothing else: {{"question": "...", {fields}, "reasoning": "..."}}"""
CHOICE = """It has four options, one of them right. The wrong ones are plausible to somebody who
  missed a part, made of what the video shows, and clearly wrong. All are alike in length and style,
  without letters before them. "answer" repeats the right one word for word."""
OPEN = """It is open-ended, without options. The answer is a word, a number or a phrase of at most
  ten words, such that everybody who saw the whole video would give it."""
REWRITE = """This question about a video was answered from captions of the video.

Question: {question}{list}
Answer: {answer}
Reasoning: {reasoning}

Rewrite the reasoning as the thoughts of somebody who has watched the video. It speaks of what is
seen and when, with times as "at 0:15", and never mentions captions, descriptions, transcripts or
clips. Keep every step and the conclusion, add no facts. Call options by their words, never by a
letter or position. The last sentence is: The answer is: {answer}

Reply with one JSON object and nothing else: {{"reasoning": "..."}}"""
FORMS = {True: (CHOICE, '"options": [...], "answer": "..."'), False: (OPEN, '"answer": "..."')}
BANNED = {  # in what stays in a row
    r"<\|?/?\w+\|?>": "holds a tag",
    r"(?i)\b(caption(s|ed)?|clips?|transcripts?|descriptions?)\b": "speaks of its source",
    r"\b([Oo]ption|[Cc]hoice)s? \W?[A-H]\b|(^|\s)\([A-H]\)|^[A-H][.):]\s": "holds option letters",
}


@dataclass(frozen=True)
class Options:
    """Options of the command."""

    videos: Path  # folder of videos, searched with all its folders
    llm: str  # server that writes questions: http://HOST:8000/v1
    captioner: str  # server of a model that sees images
    llm_model: str | None = None  # its name on the server; default: the first there
    captioner_model: str | None = None  # its name on the server; default: the first there
    out: Path = Path("runs/build")  # folder that is written, or gone on with
    categories: tuple[str, ...] = tuple(CATEGORIES)  # of questions; default: all
    questions: int = 1  # of each category for a video
    open: float = 0.5  # share of open-ended questions, 0 to 1
    clip_seconds: float = 10  # length of a clip, about
    clip_frames: int = 8  # frames of a clip that the captioner sees
    clip_side: int = 448  # longest side of such a frame in pixels
    max_tokens: int = 8192  # longest reply, with its thinking
    timeout: float = 600  # seconds for one reply
    tries: int = 3  # requests until something is lost
    parallel: int = 8  # requests at a time
    retry_lost: bool = False  # ask again for what was lost in this folder

    def __post_init__(self):
        for name, value in vars(self).items():
            if name != "open" and type(value) in (int, float) and not value > 0:  # nan, too
                raise ValueError(f"{name} must be above 0, not {value}")
        if not 0 <= self.open <= 1:
            raise ValueError(f"open must be a share from 0 to 1, not {self.open}")
        if not self.categories or set(self.categories) - set(CATEGORIES):
            known = ", ".join(CATEGORIES)
            raise ValueError(f"categories must be of {known}, not {' '.join(self.categories)!r}")


# What may change when a folder is gone on with.
FREE = ("out", "llm", "captioner", "max_tokens", "timeout", "tries", "parallel", "retry_lost")


def plain(text: str) -> str:
    """Texts that differ in case, spaces and light punctuation alone are the same."""
    return " ".join(re.findall(r"[^\s\"'“”‘’`.,:;!?*]+", text.casefold()))


def parse_reply(text: str, field: str) -> dict:
    """The first JSON object with this field: thinking, code fences and remarks are passed over."""
    text = text.rpartition("</think>")[2]
    for brace in re.finditer("{", text):
        try:
            found = json.JSONDecoder(strict=False).raw_decode(text, brace.start())[0]
        except (ValueError, RecursionError):
            continue
        if field in found:
            return found
    raise ReplyError(f"no JSON object with a {field}")


def one_line(text, what: str, banned=tuple(BANNED)) -> str:
    """A text of a reply, on one line."""
    if not isinstance(text, str) or not plain(text):
        raise ReplyError(f"the {what} is missing or empty")
    text = " ".join(text.encode(errors="ignore").decode().split())
    for pattern in banned:
        if found := re.search(pattern, text):
            raise ReplyError(f"the {what} {BANNED[pattern]}: {found[0]}")
    return text


def parse_draft(reply: str, key: str, choice: bool) -> dict:
    """Checked question, options, answer and reasoning; the key decides the order of options."""
    found = parse_reply(reply, "question")
    options = found.get("options") or []
    numbers = range(2, 9) if choice else [0]
    if not isinstance(options, list) or len(options) not in numbers:
        raise ReplyError("the wrong number of options")
    question = one_line(found.get("question"), "question")
    answer = one_line(found.get("answer"), "answer")
    reasoning = one_line(found.get("reasoning"), "reasoning", banned=())
    options = sorted((one_line(o, "option") for o in options), key=lambda o: digest(key, o))
    right = [option for option in options if plain(option) == plain(answer)]
    listed = re.search(r"(^|\s)\(?A[.):]\s.*\s\(?B[.):]\s", question)
    if listed or len(found["question"].strip().splitlines()) > 1:
        raise ReplyError("the question holds options or several lines")
    if len({plain(option) for option in options}) < len(options):
        raise ReplyError("two options are the same")
    if choice and not right:
        raise ReplyError("the answer is none of the options")
    if choice:
        answer = right[0]
    return {"question": question, "options": options, "answer": answer, "reasoning": reasoning}


def parse_rewritten(reply: str, draft: dict) -> dict:
    """The row of a draft whose reasoning was rewritten."""
    reasoning = one_line(parse_reply(reply, "reasoning")["reasoning"], "reasoning")
    if len(reasoning.split()) < MIN_WORDS:
        raise ReplyError(f"the reasoning has fewer than {MIN_WORDS} words")
    answer = draft["answer"]
    if not plain(reasoning).endswith(f" answer is {plain(answer)}"):
        raise ReplyError("the reasoning does not end with the answer")
    letters = dict(zip(draft["options"], string.ascii_uppercase))
    row = {
        "problem_id": draft["draft"],
        "problem": "\n".join([draft["question"], *(f"{letters[o]}. {o}" for o in letters)]),
        "data_type": "video",
        "problem_type": draft["category"],
        "reasoning": reasoning,
        "videos": draft["video"],
        "answer": f"<answer>{letters.get(answer, answer)}</answer>",
    }
    parse_row(row, "")
    return row


def digest(*parts: str) -> str:
    return hashlib.sha256(os.fsencode("\n".join(parts))).hexdigest()


def share(*parts: str) -> float:
    """A number in [0, 1), uniform over what is hashed."""
    return int(digest(*parts)[:8], 16) / 16**8


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes:02}:{rest:02}"


def jpeg(frame, side: int) -> dict:
    """A frame (H, W, 3), its longest side at most `side` pixels, as a part of a message."""
    from PIL import Image

    image = Image.fromarray(frame)
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    url = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def sft_videos(rows: list[dict]) -> set[str]:
    """Videos for SFT: in an order of hashes, as many as bring their share of the rows nearest."""
    count = Counter(row["videos"] for row in rows)
    videos = sorted(count, key=digest)
    sums = [0, *itertools.accumulate(count[video] for video in videos)]
    nearest = min(range(len(sums)), key=lambda n: abs(sums[n] - SFT_SHARE * len(rows)))
    return set(videos[:nearest])


class Clip(NamedTuple):
    video: str
    start: float  # seconds
    end: float


class Question(NamedTuple):
    video: str
    category: str
    choice: bool  # or open-ended
    prompt: str  # for the LLM that writes it


class Builder:
    """The stages of the picture. Each is a function of a key and what is known of it, to a line."""

    def __init__(self, options: Options):
        self.options = options
        self.root = options.videos.resolve()
        if not self.root.is_dir():
            raise DataError(f"--videos {self.root}: no such folder")
        found = (p for p in self.root.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
        self.videos = sorted(p.relative_to(self.root).as_posix() for p in found)
        if not self.videos:
            raise DataError(f"--videos {self.root}: no file ends in {', '.join(ENDINGS)}")
        self.captioner = Chat(options.captioner, options.captioner_model, options.timeout)
        self.llm = Chat(options.llm, options.llm_model, options.timeout)
        self.loader = Loader(1)  # which decodes in other processes
        settings = {name: v for name, v in asdict(options).items() if name not in FREE}
        settings |= {"captioner_model": self.captioner.model, "llm_model": self.llm.model}
        settings["videos"] = str(self.root)
        settings["prompts"] = digest(CAPTION, QUESTION, CHOICE, OPEN, REWRITE, *CATEGORIES.values())
        advice = "give the old one, or another --out"
        self.folder = Folder(options.out, settings, what_else=advice, retry=options.retry_lost)

    def build(self) -> None:
        lengths = self.stage("videos", dict.fromkeys(self.videos), self.probe, "video")
        clips = cut(lengths)
        captions = self.stage("captions", clips, self.caption, "clip")
        self.loader.close()
        stories = self.stories(lengths, clips, captions)
        questions = self.questions(lengths, stories)
        drafts = self.stage("drafts", questions, self.draft, "draft")
        found = self.stage("rows", drafts, self.rewrite, "problem_id")
        rows = [row for _, row in sorted(found.items())]
        kinds = dict(Counter(row["problem_type"] for row in rows))
        print(f"videos {len(stories)} of {len(self.videos)}, clips {len(captions)} of {len(clips)}")
        print(f"rows {len(rows)} of {len(questions)}: {kinds}")
        self.split(rows)
        self.report_lost()
        if not rows:
            raise DataError(f"not one row was made; {self.folder.path}/lost.jsonl says why")

    def stage(self, name: str, known: dict, make, field: str) -> dict[str, dict]:
        """{key: make(key, known[key])} of all keys that are not lost; lines hold it in `field`."""
        o = self.options

        def work(keys: list[str]) -> list[dict]:
            return [make(key, known[key]) for key in keys]

        how = {"threads": o.parallel, "tries": o.tries, "field": field, "bar": name}
        return self.folder.stage(name, list(known), work, **how)

    def ask(self, model: Chat, content) -> str:
        message = {"role": "user", "content": content}
        return model.ask([message], TEMPERATURE, self.options.max_tokens)

    # --------------------------------------------------------------------- stages, and in between

    def probe(self, video: str, _) -> dict:
        """Length of a video, and the number of its clips."""
        with self.loader.open(Medium("video", str(self.root / video)), sys.maxsize) as frames:
            times = frames.times
        if len(times) < 2:
            raise DataError("a video of one frame")
        seconds = times[-1] + times[1]
        clips = max(1, min(round(seconds / self.options.clip_seconds), len(times)))
        return {"seconds": seconds, "clips": clips}

    def caption(self, key: str, clip: Clip) -> dict:
        medium = Medium("video", str(self.root / clip.video), segment=(clip.start, clip.end))
        with self.loader.open(medium, self.options.clip_frames) as frames:
            images = [jpeg(frame, self.options.clip_side) for frame in frames[:]]
        span = f"{clock(clip.start)}-{clock(clip.end)}"
        prompt = {"type": "text", "text": CAPTION.format(n=len(images), span=span)}
        text = one_line(self.ask(self.captioner, [*images, prompt]), "caption", banned=())
        if re.match(r"(?i)((i.?m|i am) )?sorry|i can(no|.)t|as an ai", text):
            raise ReplyError(f"the captioner refuses: {text[:80]}")
        return {"caption": f"[{span}] {text}"}

    def stories(self, lengths: dict, clips: dict, captions: dict) -> dict[str, list[str]]:
        """{video: its captions}; a video is lost with more than half of its clips."""
        seen = defaultdict(list)
        for key, line in captions.items():
            seen[clips[key].video].append(line["caption"])
        for video, line in lengths.items():
            if len(seen[video]) < line["clips"] / 2:
                self.folder.lost[video] = "more than half of a video's clips are lost"
        return {video: seen[video] for video in lengths if video not in self.folder.lost}

    def questions(self, lengths: dict, stories: dict) -> dict[str, Question]:
        """Those that the LLM shall write, by key; hashes choose their forms and places."""
        o = self.options
        found = {}
        for video, category, i in itertools.product(stories, o.categories, range(o.questions)):
            key = f"{video}#{category}-{i}"
            near = lengths[video]["seconds"] * (i + share("near", key)) / o.questions
            choice = share("form", key) >= o.open
            form, fields = FORMS[choice]
            told = {"about": CATEGORIES[category], "near": clock(near), "form": form}
            prompt = QUESTION.format(captions="\n".join(stories[video]), fields=fields, **told)
            found[key] = Question(video, category, choice, prompt)
        return found

    def draft(self, key: str, question: Question) -> dict:
        reply = self.ask(self.llm, question.prompt)
        line = {"video": question.video, "category": question.category}
        return line | parse_draft(reply, key, question.choice)

    def rewrite(self, key: str, draft: dict) -> dict:
        options = "".join(f"\n- {option}" for option in draft["options"])
        return parse_rewritten(self.ask(self.llm, REWRITE.format(**draft, list=options)), draft)

    # ------------------------------------------------------------------------------------ the end

    def split(self, rows: list[dict]) -> None:
        """Rows of some videos are for SFT, those of the others for RL."""
        first = sft_videos(rows)
        for name, is_first in (("sft", True), ("rl", False)):
            part = [row for row in rows if (row["videos"] in first) == is_first]
            self.folder.write_lines(f"{name}.jsonl", part)
            print(f"  {self.folder.path}/{name}.jsonl: {len(part)}")

    def report_lost(self) -> None:
        """How often each reason: it begins with what is wrong, a DataError's with its file."""
        lost = self.folder.lost
        print(f"lost {len(lost)} ({self.folder.path}/lost.jsonl; --retry_lost asks again)")
        count = Counter()
        for reason in lost.values():
            what, *details = reason.split(": ")
            is_file = details and what.startswith(str(self.root))
            count[details[0] if is_file else what] += 1
        for what, n in count.most_common():
            print(f"  {n:6d} {what}")


def cut(lengths: dict[str, dict]) -> dict[str, Clip]:
    """{key: clip}: each video in equal parts.

    >>> cut({"a.mp4": {"seconds": 25.0, "clips": 2}})["a.mp4#0001"]
    Clip(video='a.mp4', start=12.5, end=25.0)
    """
    clips = {}
    for video, line in lengths.items():
        for i in range(line["clips"]):
            start = line["seconds"] * i / line["clips"]
            end = line["seconds"] * (i + 1) / line["clips"]
            clips[f"{video}#{i:04}"] = Clip(video, start, end)
    return clips


def main(argv: list[str] | None = None) -> None:
    about = f"Questions with reasoning from videos; {GO_ON}."
    try:
        with reported():
            options = parse(Options, argv, prog="python -m kit.build", about=about)
            try:
                Builder(options).build()
            except OSError as error:
                raise DataError(str(error)) from None
            except ServerError as error:
                raise ServerError(f"{error}; {GO_ON}") from None
    except KeyboardInterrupt:
        print(f"error: interrupted; {GO_ON}", file=sys.stderr)
        os._exit(130)  # waits for no reply


if __name__ == "__main__":
    main()
