"""Generated tones: recordings for tests of speech."""

import numpy as np

from train.speech.audio import write_wave

RATE = 8_000


def tone(frequency, seconds=0.25, rate=RATE, seed=0):
    """Returns samples of a tone with its overtones and a little noise, `[samples]` float32."""
    times = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(0, 0.01, len(times))
    waves = sum(np.sin(2 * np.pi * frequency * k * times) / k for k in (1, 2, 3))
    return (0.2 * waves * np.hanning(len(times)) + noise).astype(np.float32)


def spoken(symbols, rate=RATE, seed=0):
    """Returns one tone after the other, one pitch for each symbol from 0 on."""
    return np.concatenate([tone(200 * 1.3**s, 0.1, rate, seed + s) for s in symbols])


def write_spoken(path, symbols, rate=RATE, seed=0):
    """Writes `spoken` as a .wav; returns its path."""
    write_wave(path, spoken(symbols, rate, seed), rate)
    return path
