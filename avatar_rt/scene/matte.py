"""The person of a face-centred clip cut out, and put into another place. No network: GrabCut (Rother et al., 2004).

Where a head, a neck and shoulders lie in such a crop is known well enough to start from, and so are places behind them
that have a pattern and stand still while the head moves; the colours of each picture decide the rest. Neighbouring
pictures then vote, for hair of the colour of what lies behind it is lost now and then; where it is lost for longer, the
whole clip says that it is there.
"""

from __future__ import annotations

import cv2
import numpy as np

EVERY = 4  # every so many frames are looked at
ROUNDS = 4
NEIGHBOURS = 4  # on either side that vote with a picture
ENOUGH = 0.35  # of the votes: a lost piece of hair shows more than a rim of the old place
MOSTLY = 0.5  # of all pictures: what is the person's in so many is, where it has their colour, in the others too
SAME = 40.0  # grey levels, of all three colours: what differs less has the colour
PIECE = 0.01  # of the picture: less of it is an outline that moves with the head
STRIP = (0.35, 0.03)  # what reaches the upper edge and is narrower, in widths, is wall; how much is cut off, in heights
SOFT = 1 / 128  # of the picture's width: the edge
PATTERN = 8.0  # grey levels a pixel, at 128 pixels: what changes less from place to place cannot be seen to stand
HAIR = 0.27  # of the width, to either side
STEEP = 1.5  # how much more a pattern there changes across than down
STANDS = 0.25  # of what a face moves by: what moves less stands still
MOVES = 0.4  # pixels of 128: a head that moves less says nothing about what stands behind it
BAND, REACH = 3 / 128, 3 / 128  # of the width, on either side of the edge: what may be both; whence colours are known
APART = 40.0  # grey levels between person and place from which on the colour decides how much is whose
BUST = 0.74  # of the height: lower down, clothes stand as still as walls


def person_mattes(frames: np.ndarray) -> np.ndarray:
    """How much of each pixel is the person.

    Args:
        frames: uint8 [F, H, W, 3], F >= 1, face-centred crops of one shot.

    Returns: fp32 [F, H, W] in 0..1.
    """
    prior, sigma = _prior(*frames.shape[1:3]), SOFT * frames.shape[2]
    prior[_standing(frames[::EVERY]) & (prior != cv2.GC_FGD)] = cv2.GC_BGD
    looked = _regained(frames[::EVERY], np.stack([_cut_out(f, prior) for f in frames[::EVERY]]).astype(np.float32))
    mattes = []
    for i in range(len(looked)):
        votes = np.mean(looked[max(0, i - NEIGHBOURS) : i + NEIGHBOURS + 1], axis=0)
        whole = _one_piece((votes > ENOUGH).astype(np.uint8)).astype(np.float32)
        mattes.append(cv2.GaussianBlur(whole, (0, 0), sigma))
    at = np.arange(len(frames)) / EVERY
    before = at.astype(int)
    after = np.minimum(before + 1, len(mattes) - 1)
    share = (at - before).astype(np.float32)[:, None, None]
    known = np.stack(mattes)
    return np.asarray(known[before] * (1 - share) + known[after] * share)


def _regained(frames: np.ndarray, looked: np.ndarray) -> np.ndarray:
    """What was cut off somewhere and is the person's in most pictures: uint8 [F, H, W, 3] and fp32 0 or 1 [F, H, W].

    It has to look there as it does where it is theirs: like that, or more like it than like what else is seen there.
    """
    count = looked.sum(0)[..., None]
    theirs = np.einsum("fhwc,fhw->hwc", frames, looked, dtype=np.float32) / np.maximum(count, 1)
    place = np.einsum("fhwc,fhw->hwc", frames, 1 - looked, dtype=np.float32) / np.maximum(len(frames) - count, 1)
    mostly, side = looked.mean(0) > MOSTLY, 2 * max(round(BAND * frames.shape[2]), 1) + 1
    close = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))  # a hairline that moves is neither hair nor skin
    out = []
    for frame, own in zip(frames, looked, strict=True):
        away = np.linalg.norm(frame - theirs, axis=-1)
        lost = mostly & (own == 0) & ((away < SAME) | (away < np.linalg.norm(frame - place, axis=-1)))
        if lost.mean() > PIECE:
            own = cv2.morphologyEx(np.maximum(own, lost), cv2.MORPH_CLOSE, close)
        out.append(own)
    return np.stack(out)


def take_out(frames: np.ndarray, mattes: np.ndarray, larger: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The person's own colours at the edge, where the old place shines through, and how much of a pixel is theirs.

    Near the edge the colours of person and place are known from either side of it. A pixel is as much of the person as
    its colour lies towards theirs, where the two differ; of the colour, what is then the place's is taken out (Forte,
    ICIP 2021).

    Args:
        frames: uint8 [F, h, w, 3]; mattes: fp32 [F, h, w] of ``person_mattes``.
        larger: uint8 [F, k h, k w, 3] the same frames, k times as large; k = 1 for these.

    Returns: ``larger`` so changed, and its mattes uint8 [F, k h, k w], 255 where all is the person.
    """
    colours, shares = np.empty_like(larger), np.empty(larger.shape[:3], np.uint8)
    for i in range(len(frames)):
        colours[i], shares[i] = _taken_out(frames[i].astype(np.float32), mattes[i], larger[i].astype(np.float32))
    return colours, shares


def _taken_out(frame: np.ndarray, matte: np.ndarray, larger: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One picture of ``take_out``, all fp32; the colours and the share in 0..255."""
    (height, width), size = larger.shape[:2], larger.shape[1::-1]
    person = (matte > 0.5).astype(np.uint8)
    side = 2 * max(round(BAND * frame.shape[1]), 1) + 1
    near = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    known = [cv2.erode(part, near, borderType=cv2.BORDER_REPLICATE) for part in (person, 1 - person)]
    theirs, place = (cv2.resize(_spread(frame, part.astype(np.float32)), size) for part in known)
    unknown = cv2.resize(1 - known[0] - known[1], size, interpolation=cv2.INTER_NEAREST) > 0
    share = cv2.resize(matte, size) if matte.shape != (height, width) else matte.copy()
    seen, front, back, before = larger[unknown], theirs[unknown], place[unknown], share[unknown]
    towards = front - back
    apart = np.square(towards).sum(1)
    told = np.clip(((seen - back) * towards).sum(1) / np.maximum(apart, 1e-3), 0, 1)
    off = np.square(seen - back - told[:, None] * towards).sum(1)  # a colour that neither has, nor any mix of them
    sure = apart / (apart + APART**2 + 4 * off) * (front.any(1) & back.any(1))
    share[unknown] = sure * np.minimum(told, 2 * before) + (1 - sure) * before
    share = cv2.GaussianBlur(share, (0, 0), 0.5 * SOFT * width)
    of = share[unknown][:, None]
    colours = larger.copy()
    colours[unknown] = np.clip(front + of * (seen - of * front - (1 - of) * back), 0, 255)
    return colours.round(), (255 * share).round()


def _spread(picture: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The colours of a picture fp32 [H, W, 3] where ``known`` fp32 [H, W] is 1, from there to around it; 0 far off."""
    sigma = REACH * picture.shape[1]
    total = cv2.GaussianBlur(known, (0, 0), sigma)[..., None]
    return np.asarray(cv2.GaussianBlur(picture * known[..., None], (0, 0), sigma) / np.maximum(total, 1e-3))


def place_person(frames: np.ndarray, mattes: np.ndarray, scene: np.ndarray) -> np.ndarray:
    """The person of frames uint8 [F, H, W, 3], cut out by mattes uint8 [F, H, W], before a scene uint8 [H, W, 3]."""
    placed = np.empty_like(frames)
    for frame, matte, out in zip(frames, mattes, placed, strict=True):
        share = matte.astype(np.float32) / 255
        cv2.blendLinear(frame, scene, share, 1 - share, out)
    return placed


def _standing(frames: np.ndarray) -> np.ndarray:
    """Where a pattern stands still while the head moves, above the shoulders: bool [H, W].

    How far something moves is told by how much a pixel changes in time, over how much it changes from place to place.
    Where hair is, only what changes across says so: a head that turns does not move its crown.
    """
    height, width = frames.shape[1:3]
    grey = np.stack([cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in frames]).astype(np.float32)
    across, down = (np.mean([abs(cv2.Sobel(g, cv2.CV_32F, 1 - d, d)) for g in grey], axis=0) / 8 for d in (0, 1))
    slope, aside = np.hypot(across, down), abs(np.arange(width) + 0.5 - width / 2) > HAIR * width
    pattern = (slope * width / 128 > PATTERN) & (aside | (across > STEEP * down))
    changed = np.sqrt(cv2.blur(grey.var(0), (3, 3)))  # beside an edge that moves there is a slope and no change
    moved = changed / np.maximum(slope, 1e-3) * 128 / width
    face = np.s_[round(0.35 * height) : round(0.6 * height), round(0.4 * width) : round(0.6 * width)]
    seen = moved[face][slope[face] * width / 128 > PATTERN]
    if not len(seen) or (usual := float(np.median(seen))) < MOVES:
        return np.zeros((height, width), bool)
    still = pattern & (moved < STANDS * usual)
    still[round(BUST * height) :] = False
    return np.asarray(still)


def _cut_out(frame: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """The person in one picture, as 0 or 1 with a soft edge, fp32."""
    found, below = _grab(frame, prior), round(STRIP[1] * len(frame))
    if 0 < found[0].mean() < STRIP[0]:
        without = prior.copy()
        without[:below] = cv2.GC_BGD
        found = _grab(frame, without)
    return cv2.GaussianBlur(found.astype(np.float32), (0, 0), SOFT * frame.shape[1])


def _grab(frame: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """GrabCut's person, begun with a mask uint8 [H, W]: 0 or 1."""
    mask = prior.copy()
    cv2.setRNGSeed(0)
    background, person = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.grabCut(np.ascontiguousarray(frame), mask, (0, 0, 0, 0), background, person, ROUNDS, cv2.GC_INIT_WITH_MASK)
    return _one_piece(((mask == cv2.GC_FGD) | (mask == cv2.GC_PR_FGD)).astype(np.uint8))


def _one_piece(found: np.ndarray) -> np.ndarray:
    """Of a mask uint8 [H, W] the piece in the middle, its holes filled."""
    height, width = found.shape
    labels = cv2.connectedComponents(found)[1]
    piece = (labels == labels[height // 2, width // 2]).astype(np.uint8) & found
    count, labels, facts, _ = cv2.connectedComponentsWithStats(1 - piece)
    for i in range(1, count):
        x, y, w, h = facts[i, :4]
        if x > 0 and y > 0 and x + w < width and y + h < height:
            piece[labels == i] = 1
    return piece


def _prior(height: int, width: int) -> np.ndarray:
    """GrabCut's mask to begin with, uint8 [height, width]: a bust, its middle certain, and the upper corners not it.
    Certain up to where hair is: hair as dark as what lies behind it is only kept where its colour is known to be hair.
    """
    y, x = np.mgrid[0:height, 0:width] + 0.5
    y, x = y / height, x / width - 0.5

    def oval(middle: float, across: float, up: float) -> np.ndarray:
        return np.asarray((x / across) ** 2 + ((y - middle) / up) ** 2 < 1)

    mask = np.full((height, width), cv2.GC_PR_BGD, np.uint8)
    mask[oval(0.47, 0.36, 0.48) | ((y > 0.83) & (abs(x) < 0.147 + 2.22 * (y - 0.83)))] = cv2.GC_PR_FGD
    face, hair = oval(0.5, 0.15, 0.24), oval(0.38, 0.14, 0.24)
    neck, chest = (y > 0.68) & (abs(x) < 0.06), (y > 0.9) & (abs(x) < 0.15)
    mask[face | hair | neck | chest] = cv2.GC_FGD
    mask[((y < 0.66) & (abs(x) > 0.46)) | ((y < 0.12) & (abs(x) > 0.36))] = cv2.GC_BGD
    return mask
