"""Synthetic glacier scenes in the competition's layout, for the demo and the tests (`python -m prep sample`).

A scene is built as nature builds one: fractal relief carved by rivers, snow that feeds ice above an
equilibrium line, ice that follows the drainage down into the valleys until it has melted, debris on its
lower end and along its sides, lakes below its ends, then a satellite that looks at it all under a low sun.
Apart from warm slopes all ground is under snow, so that colour alone does not give the classes away, as in
the real tiles. No real data is read or copied; constants called "tuned" were set so that statistics and looks
of a sample resemble those of the real tiles.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import tifffile

from solution import BANDS, CLASS_NAMES, CLASS_VALUES, GDAL_NODATA_TAG, InputError

OTHER, GLACIER, DEBRIS, LAKE = range(len(CLASS_NAMES))
NAMINGS = ("training", "platform")
LABELINGS = ("phase1", "phase2", "both")
SMALLEST_SIZE = 64  # px
MOST_TILES = {"training": 99 * 99, "platform": 999}  # the names have two digits for row and column, or three

# --- Constants ------------------------------------------------------------------------------------

PIXEL = 30.0  # m, Landsat 8 OLI
COARSE = 4  # pixels a side of a cell of the grid on which water and ice are routed
CELL = COARSE * PIXEL  # m
MARGIN = 32  # px simulated around the scene, so that glaciers may enter and leave it
SMALLEST_CANVAS = 256  # px; smaller scenes are cut out of one of this size, around a lake
ATTEMPTS = 100  # reliefs tried until one has every class; nearly always the first or the second will do

RELIEF_WAVELENGTH = 9000.0  # m, spacing of the large massifs
HURST = 0.8  # a surface of fractal dimension 2.2, as of topography (Turcotte 1997)
EROSION_EXPONENT = 0.5  # of the drainage area in the stream power law (Whipple & Tucker 1999)
EROSION_LEVELS = ((4, 16), (2, 8), (1, 3))  # (cells a side of a coarser cell, steps): large valleys first
EROSION_STRENGTH = 0.20  # tuned, as the next three: valleys are carved in a few steps
INITIAL_RELIEF = 300.0  # m, standard deviation of the heights before erosion
UPLIFT = 60.0  # m a step
ROUGHNESS = 0.15  # of the cell, m/m
TALUS_SLOPE = np.tan(np.radians(45))  # steeper ground sheds rock

NO_GROUND = -1e4  # m, the height of what lies beyond the rim: it casts no shadow

LAPSE_RATE = 6.5e-3  # K/m, International Standard Atmosphere
MELTING_POINT = 273.15  # K
BALANCE_GRADIENT = 0.006  # m water equivalent a year per m of height, in the usual range of 0.004-0.01
LARGEST_ACCUMULATION = 1.2  # m water equivalent a year
LARGEST_ABLATION = 3.0
SHADE_LOWERS_LINE = 220.0  # m by which full shade lowers equilibrium line and snow line (tuned)
AVALANCHE_SLOPE = np.tan(np.radians(40))  # steeper slopes do not hold ice; their snow feeds the glacier below
SMALLEST_FLUX = 3.0  # routed balance that still makes a tongue (tuned)
DRAINAGE_CELLS = 40  # cells that drain into a cell of a stream
MELTING_WIDTH = 0.35  # cells of the tongue that melt at a point of its axis, times a growth with flux (tuned)
ICE_DEPTH = 46.0  # m, of ice at a flux of 1 above the smallest (tuned)
DEPTH_EXPONENT = 1 / 3  # large glaciers are deeper
THICKEST_ICE = 250.0  # m
SMALLEST_GLACIER = 12  # px, 0.01 km2: the smallest in glacier inventories (Paul et al. 2009)

# Albedo in blue, green, red and SWIR-1: fresh snow is bright and dark beyond 1.5 um (Wiscombe & Warren 1980),
# rock and debris brighten towards the infrared, water is darkest there. Exact values tuned.
SNOW = (1.10, 1.06, 1.06, 0.065)
FIRN = (1.08, 1.03, 1.02, 0.045)  # what glaciers show: colder, coarser snow
ROCK = (0.15, 0.18, 0.21, 0.250)
STONES = (0.13, 0.15, 0.17, 0.210)  # supraglacial debris
WATER = (0.11, 0.10, 0.07, 0.012)
SKYLIGHT = (0.125, 0.115, 0.090, 0.010)  # share of the incoming light that reaches shaded ground (Rayleigh)
PATH_OFFSET = (-0.080, -0.072, -0.080, -0.024)  # over-corrected atmosphere: deep shade is below 0
OFFSET_SPREAD = 0.010
SWIR = 3  # index of the band
GRAIN_SPREAD = 0.4  # of the logarithm of the SWIR albedo (tuned)
REFLECTANCE_NOISE = (0.006, 0.006, 0.006, 0.004)
THERMAL_NOISE = 0.15  # K
THERMAL_BLUR = 1.4  # px (sigma): TIRS resolves 100 m, resampled to 30 m (USGS LSDS-1574)

SUN_WARMING = 6.0  # K for snow that faces the sun (tuned, as the next five)
ROCK_WARMING = 13.0
STONES_WARMING = 1.0
COLD_AIR = 6.0  # K by which glaciers are colder than the ground around them
COLD_AIR_REACH = 8.0  # px (sigma): the cold air over a glacier spreads beyond its edge
WIND = 1.8  # K, standard deviation of what else moves temperatures

LARGEST_DN = 65454  # of a measurement in the real tiles
PARTIAL_NODATA_SHARE = 0.01  # of the pixels: a zero in one band only
PARTIAL_NODATA_BANDS = (0.25, 0.10, 0.40, 0.10, 0.15)  # how these are spread over the bands
MASK_BLOCK = 9  # px, side of the square by which masks of cloud and shadow are grown

UTM_ZONE_43N = 32643  # EPSG
GRID_ORIGIN = (600000.0, 3790000.0)  # easting and northing of the corner of tile 00_00


# --- A scene and its parameters -------------------------------------------------------------------


@dataclass(frozen=True)
class SceneParameters:
    """What is drawn at random about a scene; the tiles of a sample share the sun and the air.

    Angles in degrees (azimuth clockwise from north), heights in metres, temperature in kelvin, shares 0-1.
    """

    size: int
    sun_azimuth: float
    sun_elevation: float
    mean_elevation: float
    relief: float  # standard deviation of the heights
    equilibrium_quantile: float  # share of the ground that lies below the equilibrium line
    snow_line_drop: float  # of the snow line below the equilibrium line
    temperature: float  # of shaded snow at the mean elevation
    path_offset: tuple[float, ...]  # one a reflective band
    debris_share: float  # of the glacier area
    nodata_share: float


@dataclass(frozen=True)
class Scene:
    """A synthetic tile.

    Attributes:
        elevation: (H, W) float32, metres, surface of ground, ice and water.
        bands: (H, W, 5) float32, reflectance (bands 1-4) and kelvin (band 5), NaN where nodata; the values
            are exactly those that a written tile gives back.
        classes: (H, W) uint8, class index 0-3; 0 where nodata.
        parameters: what was drawn.
    """

    elevation: np.ndarray
    bands: np.ndarray
    classes: np.ndarray
    parameters: SceneParameters


@dataclass
class _Drainage:
    """Where water goes, on flattened cells: `order` runs from the outlets up; outlets have parent -1."""

    order: list[int]
    parent: list[int]
    shape: tuple[int, int]


@dataclass
class _Ice:
    """What flows down the drainage, on (rows, cols) cells.

    Attributes:
        surface: metres, level up to which ice fills the valley here; the ground's where there is none.
        height: share (0-1) of the way from the valley's axis up to the ice surface.
        melted: share (0-1) of its largest flux that the glacier has lost on the way here.
        flux: routed balance, flattened.
        termini: (cell, largest flux) of each end of a tongue, largest first.
    """

    surface: np.ndarray
    height: np.ndarray
    melted: np.ndarray
    flux: np.ndarray
    termini: list[tuple[int, float]]


def make_scene(seed: int, size: int, index: int = 0) -> Scene:
    """Return one synthetic scene with every class in it.

    Args:
        seed: of the acquisition: the sun and the air.
        size: side of the scene in pixels, at least 64.
        index: of the tile within the acquisition.

    Raises:
        InputError: size below 64, or no relief with every class (not seen so far).
    """
    if size < SMALLEST_SIZE:
        raise InputError(f"found a size of {size} px, expected at least {SMALLEST_SIZE}")
    for attempt in range(ATTEMPTS):
        rng = np.random.default_rng([seed, index, attempt])
        scene = _try_scene(draw_parameters(seed, size, rng), rng)
        if scene is not None and len(np.unique(scene.classes)) == len(CLASS_NAMES):
            return scene
    raise InputError(f"seed {seed}, tile {index}: none of {ATTEMPTS} reliefs has every class; choose another seed")


def draw_parameters(seed: int, size: int, rng: np.random.Generator) -> SceneParameters:
    """Draw a scene's parameters: sun and air from the acquisition's `seed`, the rest from `rng`."""
    acquisition = np.random.default_rng([seed, 0xACC])
    return SceneParameters(
        size=size,
        sun_azimuth=acquisition.uniform(140, 160),
        sun_elevation=acquisition.uniform(35, 39),
        mean_elevation=5000 + rng.uniform(-150, 150),
        relief=rng.uniform(430, 560),
        equilibrium_quantile=rng.uniform(0.60, 0.76),
        snow_line_drop=rng.uniform(700, 1000),
        temperature=acquisition.uniform(252.0, 254.0),
        path_offset=tuple(v + acquisition.normal(0, OFFSET_SPREAD / 2) for v in PATH_OFFSET),
        debris_share=rng.uniform(0.16, 0.34),
        nodata_share=rng.uniform(0.12, 0.28),
    )


def _try_scene(parameters: SceneParameters, rng: np.random.Generator) -> Scene | None:
    """Return the scene of one relief; None where no lake lies in it."""
    coarse = carve_relief(parameters, rng)
    elevation = add_detail(coarse, rng)
    drainage = route_water(coarse)
    line = equilibrium_line(elevation, parameters)
    ice = flow_ice(coarse, _shrink(line), drainage)

    lakes = place_lakes(ice, drainage, parameters.size, elevation.shape[0], rng)
    if not lakes:
        return None
    classes, elevation = cover_ground(elevation, line, ice, lakes, parameters, rng)
    lake, window = choose_window(classes, lakes, parameters.size)
    bands = observe(elevation, line, classes, parameters, rng)

    elevation, classes, bands = elevation[window], classes[window], bands[window]
    centre = lake[0] - (window[1].start, window[0].start)
    masked = mask_clouds(elevation, parameters, centre, rng)
    classes = np.where(masked, OTHER, classes).astype(np.uint8)
    bands = drop_values(bands, masked, rng)
    return Scene(elevation.astype(np.float32), bands, classes, parameters)


def choose_window(classes: np.ndarray, lakes: list[np.ndarray], size: int) -> tuple[np.ndarray, tuple[slice, slice]]:
    """Return the lake around which the rarest class has most pixels, and the scene's place on the canvas."""

    def rarest(choice: tuple[np.ndarray, tuple[slice, slice]]) -> int:
        return int(np.bincount(classes[choice[1]].ravel(), minlength=len(CLASS_NAMES)).min())

    return max(((lake, _window(lake, size, classes.shape[0])) for lake in lakes), key=rarest)


def _window(lake: np.ndarray, size: int, side: int) -> tuple[slice, slice]:
    """Return the scene's place on the canvas: its middle, or for small scenes where a tongue meets `lake`."""
    centre = lake[0] if size < SMALLEST_CANVAS else (side / 2, side / 2)
    col, row = (int(np.clip(c - size / 2, MARGIN, side - MARGIN - size)) for c in centre)
    return slice(row, row + size), slice(col, col + size)


# --- Relief ---------------------------------------------------------------------------------------


def fractal(rng: np.random.Generator, side: int, longest: float, hurst: float) -> np.ndarray:
    """Return (side, side) noise of mean 0 and standard deviation 1 by spectral synthesis.

    Power falls as wavelength^(2 hurst + 2) below `longest` (in pixels) and is even above it (Turcotte 1997).
    """
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])
    amplitude = np.maximum(frequency * longest, 1) ** -(hurst + 1)
    amplitude[0, 0] = 0
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((side, side))) * amplitude, (side, side))
    return noise / noise.std()


def carve_relief(parameters: SceneParameters, rng: np.random.Generator) -> np.ndarray:
    """Return heights in metres, float64, on a square grid of 120 m cells: fractal relief carved by rivers."""
    side = _ceil_divide(max(parameters.size, SMALLEST_CANVAS) + 2 * MARGIN, COARSE)
    coarsest = EROSION_LEVELS[0][0]
    wavelength = RELIEF_WAVELENGTH / (coarsest * CELL)
    z = INITIAL_RELIEF * fractal(rng, _ceil_divide(side, coarsest), wavelength, HURST)
    for cells, steps in EROSION_LEVELS:
        z = _enlarge(z, _ceil_divide(side, cells))
        for _ in range(steps):
            z = erode(z, cells * CELL, rng)
    z = np.asarray(cv2.GaussianBlur(z, (0, 0), 0.7))
    return parameters.mean_elevation + (z - z.mean()) / z.std() * parameters.relief


def erode(z: np.ndarray, cell: float, rng: np.random.Generator) -> np.ndarray:
    """Return heights after one implicit step of the stream power law (Braun & Willett 2013), and landslides.

    `cell` is in metres. The rim keeps its height, everything else is lifted first. Rough ground, different in
    each step, keeps streams from running along the grid.
    """
    drainage = route_water(z + rng.normal(0, ROUGHNESS * cell, z.shape))
    area = accumulate(drainage).ravel() * (cell / CELL) ** 2
    factor = (EROSION_STRENGTH * CELL / cell * area**EROSION_EXPONENT).tolist()
    steepest = (TALUS_SLOPE * cell * 1.2 * rng.uniform(0.7, 1.3, z.size)).tolist()
    out = (z + UPLIFT).ravel().tolist()
    for c in drainage.order:  # downstream first, so that the parent's new height is known
        p = drainage.parent[c]
        if p < 0:
            out[c] -= UPLIFT
        else:
            out[c] = min((out[c] + factor[c] * out[p]) / (1 + factor[c]), out[p] + steepest[c])
    return np.array(out).reshape(z.shape)


def route_water(z: np.ndarray) -> _Drainage:
    """Return the drainage of a relief by priority flood (Barnes et al. 2014), which crosses hollows."""
    rows, cols = z.shape
    heights = np.pad(z, 1).ravel().tolist()
    width = cols + 2
    border = np.ones((rows + 2, width), bool)
    border[1:-1, 1:-1] = False
    closed = border.ravel().tolist()
    rim = np.zeros((rows + 2, width), bool)
    rim[1:-1, 1:-1] = True
    rim[2:-2, 2:-2] = False
    heap = [(heights[c], c) for c in np.flatnonzero(rim).tolist()]
    heapq.heapify(heap)
    parent = [-1] * len(heights)
    for _, c in heap:
        closed[c] = True
    order = []
    around = (-width, -1, 1, width, -width - 1, -width + 1, width - 1, width + 1)
    while heap:
        level, c = heapq.heappop(heap)
        order.append(c)
        for step in around:
            n = c + step
            if not closed[n]:
                closed[n] = True
                parent[n] = c
                heapq.heappush(heap, (max(heights[n], level), n))
    inner = (np.arange(len(heights)) // width - 1) * cols + np.arange(len(heights)) % width - 1
    inner = inner.tolist()
    parents = [-1] * (rows * cols)
    for c in order:
        parents[inner[c]] = inner[parent[c]] if parent[c] >= 0 else -1
    return _Drainage([inner[c] for c in order], parents, z.shape)


def accumulate(drainage: _Drainage) -> np.ndarray:
    """Return the number of cells that drain through each cell, itself included, (rows, cols) float64."""
    area = [1.0] * len(drainage.parent)
    for c in reversed(drainage.order):
        p = drainage.parent[c]
        if p >= 0:
            area[p] += area[c]
    return np.array(area).reshape(drainage.shape)


def add_detail(coarse: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return heights on the grid of 30 m pixels: the coarse relief with rough ground, most where steep."""
    side = coarse.shape[0] * COARSE
    z = cv2.GaussianBlur(_enlarge(coarse, side), (0, 0), COARSE / 2)
    steepness = np.clip(cv2.GaussianBlur(slope(z), (0, 0), 3), 0, 1.2)
    return z + fractal(rng, side, 14, 0.55) * (1 + 10 * steepness)


def slope(z: np.ndarray) -> np.ndarray:
    """Return the tangent of the slope of heights in metres on 30 m pixels."""
    down, right = np.gradient(z, PIXEL)
    return np.hypot(down, right)


# --- Light ----------------------------------------------------------------------------------------


def illuminate(z: np.ndarray, sun_azimuth: float, sun_elevation: float) -> np.ndarray:
    """Return the direct sunlight on each pixel relative to flat ground, (H, W).

    That is the cosine of incidence over that of a plane; 0 on slopes that face away and in cast shadow.
    `z` is in metres, angles in degrees; rows run south.
    """
    azimuth, elevation = np.radians(sun_azimuth), np.radians(sun_elevation)
    south, east = np.gradient(z, PIXEL)
    towards = np.cos(elevation) * (np.sin(azimuth) * -east + np.cos(azimuth) * south)
    cosine = (towards + np.sin(elevation)) / np.sqrt(1 + south**2 + east**2)
    lit = 1 - cast_shadow(z, sun_azimuth, sun_elevation)
    return np.clip(cosine, 0, None) * lit / np.sin(elevation)


def cast_shadow(z: np.ndarray, sun_azimuth: float, sun_elevation: float) -> np.ndarray:
    """Return 1 where higher ground within 128 pixels hides the sun, 0 where not, with a soft edge, float64.

    The height of the shadow is found by doubling: the shadow of the next 2^k pixels, moved on by 2^k.
    """
    azimuth = np.radians(sun_azimuth)
    drop = PIXEL * np.tan(np.radians(sun_elevation))
    towards = (np.sin(azimuth), -np.cos(azimuth))  # columns, rows

    def move(heights: np.ndarray, pixels: int) -> np.ndarray:
        matrix = np.array([[1, 0, towards[0] * pixels], [0, 1, towards[1] * pixels]])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        return cv2.warpAffine(heights, matrix, heights.shape[::-1], flags=flags, borderValue=NO_GROUND)

    heights = z.astype(np.float32)
    shadow = move(heights, 1) - drop
    for pixels in (1, 2, 4, 8, 16, 32, 64):
        shadow = np.maximum(shadow, move(shadow, pixels) - pixels * drop)
    hidden = np.clip((shadow - heights) / (0.5 * drop) + 0.5, 0, 1)
    return cv2.GaussianBlur(hidden.astype(np.float64), (0, 0), 0.6)


# --- Ice ------------------------------------------------------------------------------------------


def equilibrium_line(elevation: np.ndarray, parameters: SceneParameters) -> np.ndarray:
    """Return the height in metres above which snow outlasts the summer, (H, W): lower on shaded slopes."""
    line = np.quantile(elevation, parameters.equilibrium_quantile)
    smooth = cv2.GaussianBlur(elevation, (0, 0), 4)
    light = illuminate(smooth, parameters.sun_azimuth, 50)  # the year's sun stands higher than the day's
    shade = cv2.GaussianBlur(np.clip(1 - light, -0.5, 1), (0, 0), 3)
    return line - SHADE_LOWERS_LINE * shade


def mass_balance(height: np.ndarray) -> np.ndarray:
    """Return the yearly balance, m water equivalent, at `height` metres above the equilibrium line."""
    return np.clip(BALANCE_GRADIENT * height, -LARGEST_ABLATION, LARGEST_ACCUMULATION)


def flow_ice(coarse: np.ndarray, line: np.ndarray, drainage: _Drainage) -> _Ice:
    """Route the surplus of snow down the drainage until it has melted, and fill the valleys to match.

    Args:
        coarse: (rows, cols) heights in metres.
        line: (rows, cols) equilibrium line in metres.
        drainage: of `coarse`.
    """
    flux, largest, termini = _route_flux(mass_balance(coarse - line), drainage)
    streams = accumulate(drainage).ravel() >= DRAINAGE_CELLS
    axis = _nearest_axis(streams | (flux > SMALLEST_FLUX), drainage)
    depth = ICE_DEPTH * np.maximum(flux - SMALLEST_FLUX, 0) ** DEPTH_EXPONENT
    above = np.maximum(coarse - coarse.ravel()[axis], 0)
    filled = np.where(depth[axis] > 0, coarse.ravel()[axis] + depth[axis], coarse - 60)
    surface = cv2.GaussianBlur(filled, (0, 0), 0.8)
    height = np.clip(above / np.maximum(depth[axis], 1), 0, 1)
    melted = 1 - flux[axis] / np.maximum(largest[axis], 1e-6)
    return _Ice(surface, height, np.clip(melted, 0, 1), flux, termini)


def _route_flux(balance: np.ndarray, drainage: _Drainage) -> tuple[np.ndarray, np.ndarray, list[tuple[int, float]]]:
    """Return each flattened cell's flux, the largest flux upstream of it, and (cell, flux) of the termini."""
    gain = balance.ravel().tolist()
    flux = [0.0] * len(gain)
    largest = [0.0] * len(gain)
    termini = []
    for c in reversed(drainage.order):
        inflow = flux[c]
        width = 1 if gain[c] > 0 else MELTING_WIDTH * (1 + 0.5 * inflow**0.4)
        outflow = max(inflow + gain[c] * width, 0)
        flux[c] = outflow
        largest[c] = max(largest[c], outflow)
        if outflow == 0 and inflow > 0 and largest[c] > SMALLEST_FLUX:
            termini.append((c, largest[c]))
        p = drainage.parent[c]
        if p >= 0 and outflow > 0:
            flux[p] += outflow
            largest[p] = max(largest[p], largest[c])
    termini.sort(key=lambda terminus: -terminus[1])
    return np.array(flux), np.array(largest), termini


def _nearest_axis(channel: np.ndarray, drainage: _Drainage) -> np.ndarray:
    """Return for each cell the flattened index of the first channel cell downstream, (rows, cols) int."""
    axis = list(range(len(drainage.parent)))
    is_channel = channel.tolist()
    for c in drainage.order:
        if not is_channel[c] and drainage.parent[c] >= 0:
            axis[c] = axis[drainage.parent[c]]
    return np.array(axis).reshape(drainage.shape)


def place_lakes(ice: _Ice, drainage: _Drainage, size: int, side: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Return lakes below the largest glaciers' ends, as lines of (col, row) pixels down the valley.

    Args:
        size: of the scene in pixels; lakes lie within it, where it is as large as its canvas.
        side: of the canvas in pixels.
    """
    inset = (side - max(size, SMALLEST_CANVAS)) / 2 + 16
    count = max(3, round(5 * (size / 512) ** 2))
    lakes: list[np.ndarray] = []
    for cell, _ in ice.termini:
        path = _free_valley(cell, ice, drainage)[: rng.integers(2, 6)]
        if len(path) < 2:
            continue
        rows, cols = np.unravel_index(path, drainage.shape)
        line = (np.stack([cols, rows], axis=1) + 0.5) * COARSE
        far = all(np.hypot(*(line.mean(axis=0) - lake.mean(axis=0))) > 24 for lake in lakes)
        if far and line.min() > inset and line.max() < side - inset:
            lakes.append(line)
        if len(lakes) == count:
            break
    return lakes


def _free_valley(terminus: int, ice: _Ice, drainage: _Drainage) -> list[int]:
    """Return up to five cells downstream of a terminus, as far as no other glacier comes in."""
    path: list[int] = []
    cell = drainage.parent[terminus]
    while len(path) < 5 and cell >= 0 and ice.flux[cell] <= SMALLEST_FLUX:
        path.append(cell)
        cell = drainage.parent[cell]
    return path


# --- Ground cover ---------------------------------------------------------------------------------


def cover_ground(
    elevation: np.ndarray,
    line: np.ndarray,
    ice: _Ice,
    lakes: list[np.ndarray],
    parameters: SceneParameters,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (classes, elevation): class index a pixel, uint8, and the heights with ice and water on them."""
    thickness = _enlarge(ice.surface, elevation.shape[0]) - elevation
    glacier = clean_mask((thickness > 0) | accumulation_area(elevation, line, rng))
    classes = np.where(glacier, GLACIER, OTHER).astype(np.uint8)
    classes[find_debris(elevation, line, glacier, ice, parameters, rng)] = DEBRIS
    return _fill_lakes(classes, lay_ice(elevation, glacier, thickness), lakes, rng)


def lay_ice(bed: np.ndarray, glacier: np.ndarray, thickness: np.ndarray) -> np.ndarray:
    """Return the heights of the surface, (H, W) metres: the bed, with smooth ice where there is a glacier."""
    surface = np.where(glacier, bed + 0.85 * np.clip(thickness, 0, THICKEST_ICE), bed)
    weight = cv2.GaussianBlur(glacier.astype(np.float64), (0, 0), 1.5)
    return surface + weight * (cv2.GaussianBlur(surface, (0, 0), 2.5) - surface)


def accumulation_area(elevation: np.ndarray, line: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return where snow turns to ice in place, (H, W) bool: above the line and not on cliffs."""
    side = elevation.shape[0]
    smooth = cv2.GaussianBlur(elevation, (0, 0), 2.5)
    above = smooth - line + 60 * fractal(rng, side, 60, 0.6)
    curvature = cv2.GaussianBlur(elevation, (0, 0), 12) - smooth  # m; ridges and ribs are below 0
    hollow = 0.02 * np.clip(curvature, -60, 30)
    holds = AVALANCHE_SLOPE - slope(smooth) + hollow + 0.06 * fractal(rng, side, 40, 0.7)
    return (above > 0) & (holds > 0)


def clean_mask(mask: np.ndarray) -> np.ndarray:
    """Return the mask without ragged edges and without parts under 12 pixels."""
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3, 3))
    mask = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, kernel)
    _, parts, sizes, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    keep = sizes[:, cv2.CC_STAT_AREA] >= SMALLEST_GLACIER
    keep[0] = False
    return keep[parts]


def find_debris(
    bed: np.ndarray,
    line: np.ndarray,
    glacier: np.ndarray,
    ice: _Ice,
    parameters: SceneParameters,
    rng: np.random.Generator,
) -> np.ndarray:
    """Return where stones cover the ice, (H, W) bool: below the line, most at the ends, then along the sides.

    Stones fall on the sides all the way down, sink in above the equilibrium line and melt out below it.
    """
    side = bed.shape[0]
    melted, height = _enlarge(ice.melted, side), _enlarge(ice.height, side)
    edge = np.exp(-cv2.distanceTransform(glacier.astype(np.uint8), cv2.DIST_L2, 3) / 3.0)
    score = melted + 0.35 * edge + 0.25 * height**2 + 0.10 * fractal(rng, side, 40, 0.5)
    below = bed < line + 50
    score = np.where(glacier & below, cv2.GaussianBlur(score, (0, 0), 1.5), -np.inf)
    return clean_mask(score > np.quantile(score[glacier], 1 - parameters.debris_share))


def _fill_lakes(
    classes: np.ndarray, elevation: np.ndarray, lakes: list[np.ndarray], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return (classes, elevation) with a flat lake along each line."""
    rough = fractal(rng, classes.shape[0], 12, 0.6)
    for lake in lakes:
        drawn = np.zeros(classes.shape, np.uint8)
        cv2.polylines(drawn, [np.round(lake).astype(np.int32)], False, 1, thickness=1)
        distance = cv2.distanceTransform(1 - drawn, cv2.DIST_L2, 5)
        water = distance < rng.uniform(3.0, 5.0) + 0.8 * rough
        classes[water] = LAKE
        elevation[water] = np.median(elevation[drawn > 0])
    return classes, elevation


def snow_cover(
    elevation: np.ndarray, line: np.ndarray, parameters: SceneParameters, rng: np.random.Generator
) -> np.ndarray:
    """Return the share (0-1) of each pixel under snow: high, shaded and gentle ground, glacier or not."""
    side = elevation.shape[0]
    smooth = cv2.GaussianBlur(elevation, (0, 0), 1.5)
    sun = illuminate(smooth, parameters.sun_azimuth, parameters.sun_elevation)
    steepness = np.clip(slope(smooth), 0, 1.5) - 0.6  # 0.6: the mean slope
    bare_up_to = line - parameters.snow_line_drop + 520 * (sun - 1) + 350 * steepness
    above = elevation - bare_up_to + 110 * fractal(rng, side, 20, 0.35)
    return np.clip(above / 200 + 0.5, 0, 1)


# --- The satellite --------------------------------------------------------------------------------


def observe(
    elevation: np.ndarray,
    line: np.ndarray,
    classes: np.ndarray,
    parameters: SceneParameters,
    rng: np.random.Generator,
) -> np.ndarray:
    """Return what the sensors measure, (H, W, 5) float64: reflectance of bands 1-4, kelvin."""
    sun = illuminate(elevation, parameters.sun_azimuth, parameters.sun_elevation)
    snow = snow_cover(elevation, line, parameters, rng)
    exposed = np.clip(0.03 + 0.09 * fractal(rng, snow.shape[0], 10, 0.4), 0, 0.6)  # the rest is snowed in
    stones = np.where(classes == DEBRIS, exposed, 0)
    fractions = surface_fractions(classes, snow, stones)
    reflectance = reflect(fractions, sun, parameters, rng)
    kelvin = warm(elevation, classes, fractions, sun, parameters, rng)
    return np.dstack([reflectance, kelvin])


def surface_fractions(classes: np.ndarray, snow: np.ndarray, stones: np.ndarray) -> dict[str, np.ndarray]:
    """Return the share (0-1) of each material in each pixel, (H, W) each; they sum to 1."""
    on_ice = (classes == GLACIER) | (classes == DEBRIS)
    lake = classes == LAKE
    return {
        "snow": np.where(on_ice | lake, 0, snow),
        "firn": np.where(on_ice, 1 - stones, 0),
        "rock": np.where(on_ice | lake, 0, 1 - snow),
        "stones": np.where(on_ice, stones, 0),
        "water": lake.astype(np.float64),
    }


def reflect(
    fractions: dict[str, np.ndarray], sun: np.ndarray, parameters: SceneParameters, rng: np.random.Generator
) -> np.ndarray:
    """Return the surface reflectance of bands 1-4 as delivered, (H, W, 4): no correction for the slope.

    The product assumes flat ground, so slopes that face the sun exceed 1 and shaded ones fall below 0.
    """
    side = sun.shape[0]
    albedos = {"snow": SNOW, "firn": FIRN, "rock": ROCK, "stones": STONES, "water": WATER}
    texture = 1 + 0.045 * fractal(rng, side, 16, 0.2)
    grain = np.exp(GRAIN_SPREAD * fractal(rng, side, 40, 0.3))  # coarse snow is darker beyond 1 um
    sky = np.clip(1 + 0.5 * fractal(rng, side, 60, 0.7), 0.1, None)  # valleys see less of it
    bands = []
    for band in range(4):
        albedo = sum(share * albedos[name][band] for name, share in fractions.items()) * texture
        if band == SWIR:
            albedo *= 1 + (fractions["snow"] + fractions["firn"]) * (grain - 1)
        light = sun * (1 - SKYLIGHT[band]) + SKYLIGHT[band] * sky
        noise = rng.normal(0, REFLECTANCE_NOISE[band], sun.shape)
        bands.append(albedo * light + parameters.path_offset[band] + noise)
    return np.dstack(bands)


def warm(
    elevation: np.ndarray,
    classes: np.ndarray,
    fractions: dict[str, np.ndarray],
    sun: np.ndarray,
    parameters: SceneParameters,
    rng: np.random.Generator,
) -> np.ndarray:
    """Return surface temperatures in kelvin, (H, W): height, sun and material; ice is never above melting."""
    side = elevation.shape[0]
    kelvin = parameters.temperature - LAPSE_RATE * (elevation - parameters.mean_elevation)
    light = np.clip(cv2.GaussianBlur(sun, (0, 0), 2), 0, 1.6)
    kelvin += light * (SUN_WARMING + ROCK_WARMING * fractions["rock"])
    on_ice = (classes == GLACIER) | (classes == DEBRIS)
    kelvin -= COLD_AIR * cv2.GaussianBlur(on_ice.astype(np.float64), (0, 0), COLD_AIR_REACH)
    kelvin += np.where(classes == DEBRIS, STONES_WARMING, 0) + WIND * fractal(rng, side, 80, 0.8)
    kelvin = np.where(classes == LAKE, MELTING_POINT - 2 + light, kelvin)
    kelvin = cv2.GaussianBlur(kelvin, (0, 0), THERMAL_BLUR) + rng.normal(0, THERMAL_NOISE, kelvin.shape)
    return np.where(classes == OTHER, kelvin, np.minimum(kelvin, MELTING_POINT))


def mask_clouds(
    elevation: np.ndarray, parameters: SceneParameters, keep: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Return the pixels that are masked as cloud or its shadow, (H, W) bool.

    Fractal clouds and, as in the real tiles, patches along the edges of terrain shadow that the masking takes
    for cloud shadow; both grown by a square. The sky is clear around `keep` (col, row), where a tongue ends.
    """
    side = elevation.shape[0]
    sun = illuminate(elevation, parameters.sun_azimuth, parameters.sun_elevation)
    edges = cv2.GaussianBlur(cv2.morphologyEx(sun, cv2.MORPH_GRADIENT, np.ones((3, 3))), (0, 0), 1.5)
    rows, cols = np.mgrid[:side, :side]
    clear = np.exp(-((cols - keep[0]) ** 2 + (rows - keep[1]) ** 2) / (2 * (0.09 * min(side, 256)) ** 2))
    score = fractal(rng, side, 90, 0.55) + 0.8 * edges / edges.std() - 30 * clear
    grown = cv2.dilate(score, np.ones((MASK_BLOCK, MASK_BLOCK)))
    return grown > np.quantile(grown, 1 - parameters.nodata_share)


def drop_values(bands: np.ndarray, masked: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the bands as written and read again, float32: NaN where masked, and 1 % more in one band only.

    Single values are lost where a band is brightest or darkest: saturated or corrected to below nothing.
    """
    numbers = to_numbers(bands)
    valid = ~masked
    brightness = bands[..., 2] + rng.normal(0, 0.05, masked.shape)
    low, high = np.quantile(brightness[valid], (0.1, 0.9))
    candidates = np.flatnonzero(valid & ((brightness < low) | (brightness > high)))
    chosen = rng.choice(candidates, round(PARTIAL_NODATA_SHARE * valid.sum()), replace=False)
    lost = rng.choice(len(BANDS), len(chosen), p=PARTIAL_NODATA_BANDS)
    numbers.reshape(-1, len(BANDS))[chosen, lost] = 0
    numbers[masked] = 0
    return from_numbers(numbers)


def to_numbers(bands: np.ndarray) -> np.ndarray:
    """Return physical units as Landsat scaled integers, float32 (H, W, 5); NaN becomes 0."""
    exact = [np.round((bands[..., i] - band.offset) / band.scale) for i, band in enumerate(BANDS)]
    numbers = np.clip(np.dstack(exact), 1, LARGEST_DN)
    return np.where(np.isnan(bands), 0, numbers).astype(np.float32)


def from_numbers(numbers: np.ndarray) -> np.ndarray:
    """Return Landsat scaled integers in physical units, float32 (H, W, 5); 0 becomes NaN."""
    scale = np.array([band.scale for band in BANDS], np.float32)
    offset = np.array([band.offset for band in BANDS], np.float32)
    return np.where(numbers == 0, np.float32(np.nan), numbers * scale + offset)


def _ceil_divide(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


def _shrink(values: np.ndarray) -> np.ndarray:
    """Return pixels averaged to cells."""
    side = values.shape[0] // COARSE
    return cv2.resize(values, (side, side), interpolation=cv2.INTER_AREA)


def _enlarge(cells: np.ndarray, side: int) -> np.ndarray:
    """Return cells interpolated to pixels."""
    return cv2.resize(cells, (side, side), interpolation=cv2.INTER_LINEAR)


# --- Files ----------------------------------------------------------------------------------------


def write_sample(out: Path, tiles: int, size: int, seed: int, naming: str, labels: str) -> list[str]:
    """Write synthetic tiles in the competition's layout; return their tile ids.

    Args:
        out: folder to write to, new or empty; it gets Band1 ... Band5, label/ and perhaps label_phase2/.
        tiles: number of tiles.
        size: side of a tile in pixels, at least 64.
        seed: of all that is random; the same seed gives the same bytes.
        naming: "training" (B2_B2_masked_01_01.tif in Band1, another name in each band) or "platform"
            (img001.tif everywhere).
        labels: "phase1" (label/ with 0 and 255), "phase2" (label/ with 0, 85, 170, 255) or "both" (label/ of
            phase 1, and label_phase2/ for every third tile).

    Raises:
        InputError: an option out of range, or a folder that holds something.
    """
    out = Path(out)
    _check_options(tiles, size, seed, naming, labels)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: not empty, expected a new or empty folder; name another or remove this one")
    identifiers = []
    for index in range(tiles):
        scene = make_scene(seed, size, index)
        row, col = divmod(index, _columns(tiles))
        identifier = f"{row + 1:02d}_{col + 1:02d}" if naming == "training" else f"{index + 1:03d}"
        corner = (GRID_ORIGIN[0] + (col + 1) * size * PIXEL, GRID_ORIGIN[1] - (row + 1) * size * PIXEL)
        _write_bands(out, scene, naming, identifier, corner)
        for folder, values in _label_folders(scene.classes, labels, index).items():
            _write_raster(out / folder / _file_name("label", naming, identifier), values, corner)
        identifiers.append(identifier)
    return identifiers


def _check_options(tiles: int, size: int, seed: int, naming: str, labels: str) -> None:
    """Raise InputError at the first option that is out of range."""
    if naming not in NAMINGS:
        raise InputError(f"naming: found {naming!r}, expected one of {', '.join(NAMINGS)}")
    if labels not in LABELINGS:
        raise InputError(f"labels: found {labels!r}, expected one of {', '.join(LABELINGS)}")
    if not 1 <= tiles <= MOST_TILES[naming]:
        raise InputError(f"tiles: found {tiles}, expected 1 to {MOST_TILES[naming]} with {naming} names")
    if size < SMALLEST_SIZE:
        raise InputError(f"size: found {size} px, expected at least {SMALLEST_SIZE}")
    if seed < 0:
        raise InputError(f"seed: found {seed}, expected 0 or more")


def _columns(tiles: int) -> int:
    """Return the number of columns of the grid on which tiles lie, about as many as rows."""
    return int(np.ceil(np.sqrt(tiles)))


def phase2_values(classes: np.ndarray) -> np.ndarray:
    """Return class indices as phase-2 grey values (0, 85, 170, 255), uint8."""
    return np.array(CLASS_VALUES, np.uint8)[classes]


def phase1_values(classes: np.ndarray) -> np.ndarray:
    """Return class indices as phase-1 grey values, uint8: 255 for glaciers of either kind, 0 for the rest."""
    return np.where((classes == GLACIER) | (classes == DEBRIS), 255, 0).astype(np.uint8)


def _label_folders(classes: np.ndarray, labels: str, index: int) -> dict[str, np.ndarray]:
    """Return the label rasters of the tile with this index by folder."""
    if labels == "phase2":
        return {"label": phase2_values(classes)}
    folders = {"label": phase1_values(classes)}
    if labels == "both" and index % 3 == 0:
        folders["label_phase2"] = phase2_values(classes)
    return folders


def _file_name(kind: str, naming: str, identifier: str) -> str:
    """Return a file's name; `kind` is "label" or a Landsat band such as "B2"."""
    if naming == "platform":
        return f"img{identifier}.tif"
    stem = "Y_output_resized" if kind == "label" else f"{kind}_{kind}_masked"
    return f"{stem}_{identifier}.tif"


def _write_bands(out: Path, scene: Scene, naming: str, identifier: str, corner: tuple[float, float]) -> None:
    """Write the five band files of a scene."""
    numbers = to_numbers(scene.bands)
    for index, band in enumerate(BANDS):
        path = out / band.folder / _file_name(band.landsat, naming, identifier)
        _write_raster(path, numbers[..., index], corner)


def _write_raster(path: Path, values: np.ndarray, corner: tuple[float, float]) -> None:
    """Write (H, W) values as the organisers do: uncompressed float32, nodata 0, UTM zone 43N.

    `corner` is easting and northing of the upper left corner, metres. The tags are GeoTIFF 1.1 (OGC 19-008).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, UTM_ZONE_43N)
    tags = [
        (33550, "d", 3, (PIXEL, PIXEL, 0.0), True),
        (33922, "d", 6, (0.0, 0.0, 0.0, corner[0], corner[1], 0.0), True),
        (34735, "H", len(keys), keys, True),
        (GDAL_NODATA_TAG, "s", 0, "0", True),
    ]
    tifffile.imwrite(path, values.astype(np.float32), photometric="minisblack", metadata=None, extratags=tags)
