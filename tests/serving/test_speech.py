"""Speech: what a model hears in WAV files, on the command line, token by token what transformers and `peft` give."""

from __future__ import annotations

import json
import math
import shutil
import struct
import subprocess
import wave
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers as hf
from support.adapted import randomise
from support.command import Result, assert_refused
from support.words import word_tokenizer
from torch import nn

from peftfx import PeftfxError, runtime
from peftfx.serving.sound import read_wav, resample

Run = Callable[..., Result]
RATE = 16000
SPECIAL = [
    "<unk>",
    "<pad>",
    "<eos>",
    "<sot>",
    "<|en|>",
    "<|fr|>",
    "<|transcribe|>",
    "<|translate|>",
    "<|notimestamps|>",
]
TIMES = [f"<|{0.02 * i:.2f}|>" for i in range(51)]
WORDS = [f"w{i}" for i in range(60)]


def write_wav(path: Path, seconds: float, rate: int = RATE, seed: int = 0, channels: int = 1) -> np.ndarray:
    """Noise that comes and goes, in 16 bits; returns the numbers, [samples, channels]."""
    random = np.random.default_rng(seed)
    count = int(seconds * rate)
    shape = np.abs(np.sin(np.arange(count) * (3 + seed) / rate * 2 * math.pi))[:, None]
    samples = (random.normal(size=(count, channels)) * shape * 6000).clip(-32768, 32767).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels), file.setsampwidth(2), file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return samples


def tokenizer(words: list[str], special: list[str]) -> hf.PreTrainedTokenizerFast:
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<eos>"}
    return word_tokenizer([*special, *words], special, **names)


@dataclass
class Hearing:
    """A tiny speech-to-text model with a random LoRA: in torch, its processor, and what was exported of it."""

    peft: nn.Module
    extractor: hf.WhisperFeatureExtractor
    tokenizer: hf.PreTrainedTokenizerFast
    directory: Path

    def says(self, path: Path, **options: Any) -> tuple[torch.Tensor, str]:
        """What transformers' `generate` hears in a file, of the rate that the model hears at."""
        sound, _ = read_wav(path)
        long = len(sound) > self.extractor.n_samples
        how = {"truncation": False, "padding": "longest"} if long else {}
        made = self.extractor(sound.numpy(), sampling_rate=RATE, return_tensors="pt", **how)["input_features"]
        options = {"return_timestamps": True, **options} if long else options
        tokens = self.peft.generate(input_features=made, do_sample=False, **options)
        return tokens, self.tokenizer.decode(tokens[0], skip_special_tokens=True).strip()


def build(size: int) -> hf.WhisperForConditionalGeneration:
    torch.manual_seed(1)
    model = hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            vocab_size=size,
            d_model=32,
            encoder_layers=1,
            decoder_layers=2,
            num_mel_bins=8,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_source_positions=50,
            max_target_positions=24,
            pad_token_id=1,
            eos_token_id=2,
            bos_token_id=2,
            decoder_start_token_id=3,
            begin_suppress_tokens=None,
            init_std=0.6,
        )
    )
    model.generation_config = hf.GenerationConfig(
        decoder_start_token_id=3,
        eos_token_id=2,
        pad_token_id=1,
        max_length=24,
        is_multilingual=True,
        lang_to_id={"<|en|>": 4, "<|fr|>": 5},
        no_timestamps_token_id=8,
        task_to_id={"transcribe": 6, "translate": 7},
        suppress_tokens=[70],
        begin_suppress_tokens=[2],
        max_initial_timestamp_index=50,
    )
    return model.eval()


@pytest.fixture(scope="module")
def hearing(tmp_path_factory: pytest.TempPathFactory) -> Hearing:
    from peftfx.export.command import export_directory

    root = tmp_path_factory.mktemp("hearing")
    words = tokenizer([*TIMES, *WORDS], SPECIAL)
    base = build(len(words))
    base.save_pretrained(root / "base")
    extractor = hf.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    extractor.save_pretrained(root / "base")
    words.save_pretrained(root / "base")
    options = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "fc1"])
    model = peft.get_peft_model(base, options).eval()
    randomise(model)
    model.save_pretrained(str(root / "adapter"))
    export_directory(root / "base", root / "out", adapter=root / "adapter", view="decode")
    return Hearing(model, extractor, words, root / "out")


class TestTranscription:
    def test_a_recording_is_heard_as_by_transformers(self, hearing: Hearing, peftfx: Run, tmp_path: Path) -> None:
        said = []
        for seed in (0, 1):
            write_wav(tmp_path / f"{seed}.wav", 0.9, seed=seed)
            tokens, text = hearing.says(tmp_path / f"{seed}.wav")
            features = hearing.extractor(
                read_wav(tmp_path / f"{seed}.wav")[0].numpy(), sampling_rate=RATE, return_tensors="pt"
            )
            ours = runtime.load(hearing.directory).generate(features["input_features"], do_sample=False)
            assert torch.equal(ours, tokens)
            assert text
            said.append(text)
        result = peftfx("run", hearing.directory, "--audio", tmp_path / "0.wav", "--audio", tmp_path / "1.wav")
        assert result.code == 0, result.err
        assert result.out.splitlines() == said
        assert said[0] != said[1]

    def test_a_long_one_is_taken_piece_by_piece_with_its_times(
        self, hearing: Hearing, peftfx: Run, tmp_path: Path
    ) -> None:
        write_wav(tmp_path / "long.wav", 2.7)
        _, want = hearing.says(tmp_path / "long.wav")
        result = peftfx("run", hearing.directory, "--audio", tmp_path / "long.wav", "--json")
        assert json.loads(result.out)["text"] == want
        timed = peftfx("run", hearing.directory, "--audio", tmp_path / "long.wav", "--timestamps", "--json")
        found = json.loads(timed.out)
        assert found["text"] == want
        assert len(found["segments"]) > 1
        sound = hearing.extractor(
            read_wav(tmp_path / "long.wav")[0].numpy(),
            sampling_rate=RATE,
            return_tensors="pt",
            truncation=False,
            padding="longest",
        )["input_features"]
        theirs = hearing.peft.generate(input_features=sound, return_timestamps=True, return_segments=True)
        assert [(x["start"], x["end"]) for x in found["segments"]] == [
            (pytest.approx(float(x["start"])), pytest.approx(float(x["end"]))) for x in theirs["segments"][0]
        ]
        told = peftfx("run", hearing.directory, "--audio", tmp_path / "long.wav", "--timestamps")
        first = found["segments"][0]
        assert told.out.splitlines()[0] == f"[{first['start']:.2f} - {first['end']:.2f}] {first['text']}"

    def test_language_and_translation_force_their_tokens(self, hearing: Hearing, peftfx: Run, tmp_path: Path) -> None:
        write_wav(tmp_path / "a.wav", 0.5)
        for flags, options in (
            (("--language", "fr"), {"language": "fr"}),
            (("--language", "en", "--translate"), {"language": "en", "task": "translate"}),
        ):
            result = peftfx("run", hearing.directory, "--audio", tmp_path / "a.wav", *flags)
            assert result.out.strip() == hearing.says(tmp_path / "a.wav", **options)[1]
        assert_refused(
            peftfx("run", hearing.directory, "--audio", tmp_path / "a.wav", "--language", "klingon"),
            "Unsupported language",
        )

    def test_it_tells_the_language_as_transformers_does(self, hearing: Hearing) -> None:
        rng = torch.Generator().manual_seed(2)
        model = runtime.load(hearing.directory)
        for batch in (5, 1):
            sound = torch.randn(batch, 8, 100, generator=rng)
            want = hearing.peft.base_model.model.detect_language(input_features=sound)
            assert torch.equal(model.detect_language(input_features=sound), want)
            assert torch.equal(model.detect_language(sound), want)
            assert set(want.tolist()) <= {4, 5}
        with pytest.raises(AttributeError, match="object has no attribute 'detect_speaker'"):
            model.detect_speaker  # noqa: B018

    def test_without_times_it_takes_pieces_of_the_extractors_length(
        self, hearing: Hearing, peftfx: Run, tmp_path: Path
    ) -> None:
        shutil.copytree(hearing.directory, tmp_path / "out")
        path = tmp_path / "out" / "generation_config.json"
        config = {k: v for k, v in json.loads(path.read_text()).items() if k != "no_timestamps_token_id"}
        asks = {"return_dict_in_generate": True, "output_attentions": True}  # the words are the same
        path.write_text(json.dumps(config | asks))
        write_wav(tmp_path / "long.wav", 1.5)
        result = peftfx("run", tmp_path / "out", "--audio", tmp_path / "long.wav")
        model, sound = runtime.load(tmp_path / "out"), read_wav(tmp_path / "long.wav")[0]
        want = []
        for piece in sound.split(RATE):
            made = hearing.extractor(piece.numpy(), sampling_rate=RATE, return_tensors="pt")["input_features"]
            tokens = model.generate(made, do_sample=False, return_dict_in_generate=False)
            want.append(hearing.tokenizer.decode(tokens[0], skip_special_tokens=True).strip())
        assert result.out.strip() == " ".join(want)
        refused = peftfx("run", tmp_path / "out", "--audio", tmp_path / "long.wav", "--timestamps")
        assert_refused(refused, "no_timestamps_token_id")

    def test_what_is_no_recording_is_refused(self, hearing: Hearing, peftfx: Run, tmp_path: Path) -> None:
        (tmp_path / "a.mp3").write_bytes(b"ID3" + bytes(100))
        (tmp_path / "cut.wav").write_bytes(b"RIFF\0\0\0\0WAVEfmt ")
        write_wav(tmp_path / "empty.wav", 0)
        assert_refused(peftfx("run", hearing.directory, "--audio", tmp_path / "a.mp3"), "not a WAV file", "ffmpeg")
        assert_refused(peftfx("run", hearing.directory, "--audio", tmp_path / "cut.wav"), "WAV file is broken")
        assert_refused(peftfx("run", hearing.directory, "--audio", tmp_path / "empty.wav"), "empty")
        assert_refused(peftfx("run", hearing.directory, "--audio", tmp_path / "none.wav"), "no such recording")
        assert_refused(peftfx("run", hearing.directory, "--text", "x"), "takes sound", "--audio")

    def test_recordings_of_other_lengths_in_a_batch_are_refused(self, hearing: Hearing) -> None:
        mask = torch.tensor([[1] * 100, [1] * 60 + [0] * 40])
        with pytest.raises(PeftfxError, match="has no mask"):
            runtime.load(hearing.directory).get_encoder()(input_features=torch.zeros(2, 8, 100), attention_mask=mask)


class TestLetters:
    def test_a_ctc_model_writes_what_transformers_pipeline_does(self, peftfx: Run, tmp_path: Path) -> None:
        from peftfx.export.command import export_directory

        torch.manual_seed(0)
        letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghijklmnop"]
        (tmp_path / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
        model = hf.Wav2Vec2ForCTC(
            hf.Wav2Vec2Config(
                vocab_size=len(letters),
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=4,
                intermediate_size=48,
                conv_dim=(16, 16),
                conv_kernel=(10, 8),
                conv_stride=(80, 4),
                num_conv_pos_embeddings=8,
                num_conv_pos_embedding_groups=2,
                initializer_range=0.8,
            )
        ).eval()
        base = tmp_path / "base"
        model.save_pretrained(base)
        extractor = hf.Wav2Vec2FeatureExtractor(return_attention_mask=False)
        words = hf.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"))
        extractor.save_pretrained(base), words.save_pretrained(base)
        export_directory(base, tmp_path / "out")
        write_wav(tmp_path / "a.wav", 0.6)
        pipe = hf.pipeline(
            "automatic-speech-recognition", model=model, tokenizer=words, feature_extractor=extractor, device="cpu"
        )
        want = pipe({"raw": read_wav(tmp_path / "a.wav")[0].numpy(), "sampling_rate": RATE})["text"]
        assert len(want) > 3
        result = peftfx("run", tmp_path / "out", "--audio", tmp_path / "a.wav")
        assert result.out.strip() == want, result.err
        refused = peftfx("run", tmp_path / "out", "--audio", tmp_path / "a.wav", "--language", "fr")
        assert_refused(refused, "--language", "leave it out")


class TestLabels:
    @pytest.mark.parametrize("kind", [pytest.param(None, marks=pytest.mark.further), "SEQ_CLS"])
    def test_a_classifier_of_sequences_labels_sound(self, kind: str | None, peftfx: Run, tmp_path: Path) -> None:
        """Its class is named as those that classify texts."""
        from peftfx.export.command import export_directory

        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
        config = hf.Wav2Vec2Config(
            **sizes,
            conv_dim=(16, 16),
            conv_kernel=(10, 8),
            conv_stride=(5, 4),
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2,
            initializer_range=0.4,
            id2label={0: "cat", 1: "dog", 2: "cow"},
            label2id={"cat": 0, "dog": 1, "cow": 2},
        )
        model = hf.Wav2Vec2ForSequenceClassification(config).eval()
        extractor = hf.Wav2Vec2FeatureExtractor(return_attention_mask=False)
        model.save_pretrained(tmp_path / "base"), extractor.save_pretrained(tmp_path / "base")
        lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type=kind)
        eager = peft.get_peft_model(model, lora).eval()
        randomise(eager)
        eager.save_pretrained(str(tmp_path / "adapter"))
        task = "audio-classification" if kind is None else None
        export_directory(tmp_path / "base", tmp_path / "out", adapter=tmp_path / "adapter", task=task)
        for seconds in (0.3, 0.7):
            write_wav(tmp_path / "a.wav", seconds)
            sound = read_wav(tmp_path / "a.wav")[0].numpy()
            made = extractor(sound, sampling_rate=RATE, return_tensors="pt")
            with torch.no_grad():
                want = eager(**made).logits.softmax(-1)[0]
            result = peftfx("run", tmp_path / "out", "--audio", tmp_path / "a.wav", "--top", 3)
            assert result.code == 0, result.err
            (found,) = (json.loads(line) for line in result.out.splitlines())
            assert [one["label"] for one in found] == [config.id2label[int(i)] for i in want.argsort(descending=True)]
            for one in found:
                assert one["score"] == pytest.approx(float(want[config.label2id[one["label"]]]), abs=1e-5)
        assert_refused(peftfx("run", tmp_path / "out", "--text", "x"), "takes sound", "--audio")


class TestSound:
    @pytest.mark.parametrize("rate", [8000, 22050, 44100])
    def test_resampling_keeps_a_tone_as_it_is(self, rate: int) -> None:
        tone = [torch.sin(torch.arange(r, dtype=torch.float32) * 440 / r * 2 * math.pi) for r in (rate, RATE)]
        made = resample(tone[0], rate, RATE)
        assert made.shape == tone[1].shape
        middle = slice(2000, -2000)  # at the ends is what lies beyond: silence
        assert float((made - tone[1])[middle].abs().max()) < 2e-3

    def test_what_is_above_half_of_the_rate_is_left_out(self) -> None:
        high = torch.sin(torch.arange(44100, dtype=torch.float32) * 12000 / 44100 * 2 * math.pi)
        assert float(resample(high, 44100, RATE)[2000:-2000].abs().max()) < 2e-2

    @pytest.mark.parametrize("bits", [8, 16, 24, 32, -32, -64])
    def test_numbers_of_every_width_are_read(self, bits: int, tmp_path: Path) -> None:
        want = np.sin(np.arange(600) / 9).reshape(-1, 2) * 0.9
        width = abs(bits) // 8
        if bits < 0:
            body = want.astype(f"<f{width}").tobytes()
        elif bits == 8:
            body = (want * 128 + 128).round().astype(np.uint8).tobytes()
        else:
            whole = (want * (2 ** (bits - 1) - 1)).round().astype("<i8")
            body = b"".join(int(v).to_bytes(8, "little", signed=True)[:width] for v in whole.reshape(-1))
        head = struct.pack("<HHIIHH", 3 if bits < 0 else 1, 2, 22050, 22050 * 2 * width, 2 * width, width * 8)
        parts = (
            b"fmt "
            + struct.pack("<I", 16)
            + head
            + b"LIST\x03\0\0\0abc\0"
            + b"data"
            + struct.pack("<I", len(body))
            + body
        )
        (tmp_path / "a.wav").write_bytes(b"RIFF" + struct.pack("<I", len(parts) + 4) + b"WAVE" + parts)
        found, rate = read_wav(tmp_path / "a.wav")
        assert rate == 22050
        assert np.abs(found.numpy() - want.mean(1)).max() < (0.01 if bits == 8 else 1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng, which speaks a sentence, is not installed")
def test_a_spoken_sentence_is_heard_as_by_torch(hearing: Hearing, peftfx: Run, tmp_path: Path) -> None:
    sentence = "The quick brown fox jumps over the lazy dog."
    subprocess.run(["espeak-ng", "-w", str(tmp_path / "said.wav"), sentence], check=True)
    sound, rate = read_wav(tmp_path / "said.wav")
    assert rate != RATE
    heard = resample(sound, rate, RATE).clamp(-1, 1)
    body = (heard * 32767).round().short().numpy()
    with wave.open(str(tmp_path / "heard.wav"), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(RATE)
        file.writeframes(body.tobytes())
    said, heard_again = (
        peftfx("run", hearing.directory, "--audio", tmp_path / f"{n}.wav").out for n in ("said", "heard")
    )
    assert heard_again.strip() == hearing.says(tmp_path / "heard.wav")[1]
    assert said.strip()
