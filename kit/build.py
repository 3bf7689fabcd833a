"""Building LongVideo-Reason (section 3 of the paper): from raw videos to questions with reasoning.

    DIR/**/*.mp4                                                         OUT/videos.jsonl
      | equal clips of about 10 s, 8 frames of each as JPEG; captioner   OUT/captions.jsonl
    "[00:10-00:20] A man opens the box ..."
      | LLM, one prompt for each category                                OUT/drafts.jsonl
    question, options (or none), answer, reasoning about captions
      | LLM again: the reasoning now speaks of what is seen              OUT/rows.jsonl
    rows of data.py, 1/3 and 2/3 of them, no video in both               OUT/sft.jsonl, OUT/rl.jsonl

Captioner and LLM are OpenAI-compatible servers (`vllm serve MODEL`). A stage appends a line for
each key that is done; what is there is not asked again. So the same command goes on where a killed
run stopped, to the same bytes: what is decided here (form of a question, order of options, split)
hangs on hashes of keys, not on the order of replies. A reply that fails a check is asked for again;
after --tries its key is lost, with the reason in OUT/lost.jsonl. Nothing is repaired or replaced:
what an LLM got wrong in form is not right in fact.

What differs from the paper, which does not publish its prompts:
    DEVIATION 1: the prompts are ours. Options are shuffled here, as LLMs favour some letters; so
        reasoning names options by their texts, and ends with the text of the right one.
    DEVIATION 2: as many questions of each category; the paper's shares are 36, 36, 4, 24 %.

Run:  python -m kit.build --videos DIR --llm URL --captioner URL --out OUT
Check this file alone:  pytest tests/test_build.py
"""

import argparse
import base64
import hashlib
import io
import itertools
import json
import os
import re
import string
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from data import DataError, Medium, parse_row
from kit.chat import Chat, ReplyError, ServerError
from kit.decode import Loader

ENDINGS = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v")
SFT_SHARE, TEMPERATURE, MIN_WORDS = 1 / 3, 0.6, 20  # MIN_WORDS of a reasoning
FREE = "out llm captioner max_tokens timeout tries parallel retry_lost".split()  # may change
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


class Folder:
    """Files of lines {key: line}, and stages that append to them. lost: {key: line}."""

    def __init__(self, args, settings: dict):
        self.path, self.tries, self.parallel = Path(args.out), args.tries, args.parallel
        self.path.mkdir(parents=True, exist_ok=True)
        kept = self.path / "settings.json"
        old = json.loads(kept.read_text()) if kept.exists() else settings
        for name in settings:
            if old.get(name) != settings[name]:
                was = f"{name} was {old.get(name)!r}, now {settings[name]!r}"
                raise DataError(f"{kept}: {was}; give the old one, or another --out")
        self.write("settings.json", json.dumps(settings, indent=1))
        if args.retry_lost:
            self.write("lost.jsonl", "")
        self.lost = self.read("lost")

    def write(self, name: str, text: str) -> None:
        """A whole file or nothing of it."""
        (self.path / f"{name}.part").write_text(text)
        os.replace(self.path / f"{name}.part", self.path / name)

    def read(self, name: str) -> dict[str, dict]:
        """Lines by key. A last line that was torn when a run was killed is cut off."""
        with open(self.path / f"{name}.jsonl", "a+b") as file:
            file.seek(0)
            whole, _, torn = file.read().rpartition(b"\n")
            file.truncate(file.tell() - len(torn))
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            return {next(iter(line.values())): line for line in lines}
        except (ValueError, AttributeError, StopIteration) as error:
            raise DataError(f"{file.name}: remove the line that is broken ({error})") from None

    def append(self, name: str, line: dict) -> None:
        """In one write, so that lines of several threads stay whole."""
        with open(self.path / f"{name}.jsonl", "ab", buffering=0) as file:
            file.write(json.dumps(line).encode() + b"\n")

    def lose(self, key: str, reason: str) -> None:
        self.lost[key] = {"lost": key, "reason": reason}
        self.append("lost", self.lost[key])

    def stage(self, name: str, keys, make) -> dict[str, dict]:
        """{key: line} of name.jsonl for all keys that are not lost; new lines are make(key)."""
        from tqdm import tqdm

        done = self.read(name)
        new = [key for key in keys if key not in done and key not in self.lost]

        def one(key: str) -> None:
            for _ in range(self.tries):
                try:
                    line = make(key)
                except (ReplyError, DataError) as error:
                    reason = str(error)
                else:
                    done[key] = line
                    return self.append(name, line)
            self.lose(key, reason)

        pool = ThreadPoolExecutor(self.parallel)
        try:
            futures = [pool.submit(one, key) for key in new]
            with tqdm(as_completed(futures), name, len(new)) as bar:
                for future in bar:
                    future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return {key: done[key] for key in keys if key in done and key not in self.lost}


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
    if not isinstance(options, list) or len(options) not in (range(2, 9) if choice else [0]):
        raise ReplyError("the wrong number of options")
    question, answer = (one_line(found.get(name), name) for name in ("question", "answer"))
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
    answer = right[0] if choice else answer
    return {"question": question, "options": options, "answer": answer, "reasoning": reasoning}


def parse_rewritten(reply: str, draft: dict) -> dict:
    """The row of a draft whose reasoning was rewritten."""
    reasoning = one_line(parse_reply(reply, "reasoning")["reasoning"], "reasoning")
    if len(reasoning.split()) < MIN_WORDS:
        raise ReplyError(f"the reasoning has fewer than {MIN_WORDS} words")
    answer, options, letters = draft["answer"], draft["options"], string.ascii_uppercase
    if not plain(reasoning).endswith(f" answer is {plain(answer)}"):
        raise ReplyError("the reasoning does not end with the answer")
    row = {
        "problem_id": draft["draft"],
        "problem": "\n".join([draft["question"], *map("{}. {}".format, letters, options)]),
        "data_type": "video",
        "problem_type": draft["category"],
        "reasoning": reasoning,
        "videos": draft["video"],
        "answer": f"<answer>{letters[options.index(answer)] if options else answer}</answer>",
    }
    parse_row(row, "")
    return row


def digest(*parts: str) -> str:
    return hashlib.sha256(os.fsencode("\n".join(parts))).hexdigest()


def share(*parts: str) -> float:
    """A number in [0, 1), uniform over what is hashed."""
    return int(digest(*parts)[:8], 16) / 16**8


def clock(seconds: float) -> str:
    return "{:02}:{:02}".format(*divmod(round(seconds), 60))


def jpeg(frame, side: int) -> dict:
    """A frame (H, W, 3), its longest side at most `side` pixels, as a part of a message."""
    from PIL import Image

    image, file = Image.fromarray(frame), io.BytesIO()
    image.thumbnail((side, side))
    image.save(file, "JPEG", quality=90)
    url = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def sft_videos(rows: list[dict]) -> set[str]:
    """Videos for SFT: in an order of hashes, as many as bring their share of the rows nearest."""
    count = Counter(row["videos"] for row in rows)
    videos = sorted(count, key=digest)
    sums = [0, *itertools.accumulate(count[video] for video in videos)]
    n = min(range(len(sums)), key=lambda n: abs(sums[n] - SFT_SHARE * len(rows)))
    return set(videos[:n])


def build(args) -> None:
    root = Path(args.videos).resolve()
    if not root.is_dir():
        raise DataError(f"--videos {root}: no such folder")
    videos = (p for p in root.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
    videos = sorted(p.relative_to(root).as_posix() for p in videos)
    if not videos:
        raise DataError(f"--videos {root}: no file ends in {', '.join(ENDINGS)}")
    captioner = Chat(args.captioner, args.captioner_model, args.timeout)
    llm = Chat(args.llm, args.llm_model, args.timeout)
    settings = {k: v for k, v in vars(args).items() if k not in FREE}
    settings |= {"captioner_model": captioner.model, "llm_model": llm.model, "videos": str(root)}
    settings["prompts"] = digest(CAPTION, QUESTION, CHOICE, OPEN, REWRITE, *CATEGORIES.values())
    folder, loader = Folder(args, settings), Loader(1)  # which decodes in other processes

    def ask(model: Chat, content) -> str:
        return model.ask([{"role": "user", "content": content}], TEMPERATURE, args.max_tokens)

    def probe(video: str) -> dict:
        with loader.open(Medium("video", str(root / video)), sys.maxsize) as frames:
            times = frames.times
        if len(times) < 2:
            raise DataError("a video of one frame")
        seconds = times[-1] + times[1]
        n = max(1, min(round(seconds / args.clip_seconds), len(times)))
        return {"video": video, "seconds": seconds, "clips": n}

    lengths = folder.stage("videos", videos, probe)
    clips = {
        f"{video}#{i:04}": (video, *(line["seconds"] * k / line["clips"] for k in (i, i + 1)))
        for video, line in lengths.items()
        for i in range(line["clips"])
    }

    def caption(key: str) -> dict:
        video, start, end = clips[key]
        medium = Medium("video", str(root / video), segment=(start, end))
        with loader.open(medium, args.clip_frames) as frames:
            images = [jpeg(frame, args.clip_side) for frame in frames[:]]
        when = f"{clock(start)}-{clock(end)}"
        prompt = {"type": "text", "text": CAPTION.format(n=len(images), span=when)}
        text = one_line(ask(captioner, [*images, prompt]), "caption", banned=())
        if re.match(r"(?i)((i.?m|i am) )?sorry|i can(no|.)t|as an ai", text):
            raise ReplyError(f"the captioner refuses: {text[:80]}")
        return {"clip": key, "caption": f"[{when}] {text}"}

    captions, seen = folder.stage("captions", clips, caption), {video: [] for video in lengths}
    loader.close()
    for key, line in captions.items():
        seen[clips[key][0]].append(line["caption"])
    for video, line in lengths.items():
        if len(seen[video]) < line["clips"] / 2:
            folder.lose(video, "more than half of a video's clips are lost")
    kept = [video for video in lengths if video not in folder.lost]
    each = itertools.product(kept, args.categories, range(args.questions))
    questions = {f"{video}#{category}-{i}": (video, category, i) for video, category, i in each}

    def draft(key: str) -> dict:
        video, category, i = questions[key]
        choice = share("form", key) >= args.open
        near = lengths[video]["seconds"] * (i + share("near", key)) / args.questions
        form, fields = FORMS[choice]
        how = {"about": CATEGORIES[category], "near": clock(near), "form": form, "fields": fields}
        prompt = QUESTION.format(captions="\n".join(seen[video]), **how)
        line = {"draft": key, "video": video, "category": category}
        return line | parse_draft(ask(llm, prompt), key, choice)

    drafts = folder.stage("drafts", questions, draft)

    def rewrite(key: str) -> dict:
        options = "".join(f"\n- {option}" for option in drafts[key]["options"])
        return parse_rewritten(ask(llm, REWRITE.format(**drafts[key], list=options)), drafts[key])

    rows = [row for _, row in sorted(folder.stage("rows", drafts, rewrite).items())]
    kinds, first = Counter(row["problem_type"] for row in rows), sft_videos(rows)
    print(f"videos {len(kept)} of {len(videos)}, clips {len(captions)} of {len(clips)}")
    print(f"rows {len(rows)} of {len(questions)}: {dict(kinds)}")
    for name, is_first in (("sft", True), ("rl", False)):
        part = [json.dumps(row) + "\n" for row in rows if (row["videos"] in first) == is_first]
        folder.write(f"{name}.jsonl", "".join(part))
        print(f"  {folder.path}/{name}.jsonl: {len(part)}")
    print(f"lost {len(folder.lost)} ({folder.path}/lost.jsonl; --retry_lost asks again)")
    reasons = [line["reason"].split(": ") for line in folder.lost.values()]
    # A reason begins with what is wrong, then what exactly; a DataError's with the file.
    for reason, n in Counter(r[r[0].startswith(str(root))] for r in reasons).most_common():
        print(f"  {n:6d} {reason}")
    if not rows:
        raise DataError(f"not one row was made; {folder.path}/lost.jsonl says why")


def main(argv: list[str] | None = None) -> None:
    about = "Questions with reasoning from videos; the same command goes on where it stopped."
    parser = argparse.ArgumentParser("python -m kit.build", description=about, allow_abbrev=False)
    add = parser.add_argument
    add("--videos", required=True, help="folder of videos, searched with all its folders")
    add("--llm", required=True, metavar="URL", help="server that writes questions: http://.../v1")
    add("--captioner", required=True, metavar="URL", help="server of a model that sees images")
    add("--llm_model", help="its name on the server; default: the first there")
    add("--captioner_model", help="its name on the server; default: the first there")
    add("--out", default="runs/build", help="folder that is written, or gone on with")
    add("--categories", nargs="+", choices=CATEGORIES, default=[*CATEGORIES], help="default: all")
    add("--questions", type=int, default=1, help="of each category for a video")
    add("--open", type=float, default=0.5, help="share of open-ended questions, 0 to 1")
    add("--clip_seconds", type=float, default=10, help="length of a clip, about")
    add("--clip_frames", type=int, default=8, help="frames of a clip that the captioner sees")
    add("--clip_side", type=int, default=448, help="longest side of such a frame in pixels")
    add("--max_tokens", type=int, default=8192, help="longest reply, with its thinking")
    add("--timeout", type=float, default=600, help="seconds for one reply")
    add("--tries", type=int, default=3, help="requests until something is lost")
    add("--parallel", type=int, default=8, help="requests at a time")
    add("--retry_lost", action="store_true", help="ask again for what was lost in this folder")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():  # nan fails too
        if type(value) in (int, float) and not (0 <= value <= 1 if name == "open" else value > 0):
            parser.error(f"--{name} {value} is out of range")
    try:
        build(args)
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")
    except ServerError as error:
        sys.exit(f"error: {error}; the same command goes on where it stopped")
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on where it stopped", file=sys.stderr)
        os._exit(130)  # waits for no reply


if __name__ == "__main__":
    main()
