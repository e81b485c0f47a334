// The picture that a drawing starts from, and what of it is painted over: that is drawn anew.

const $ = (id) => document.getElementById(id);
const LARGEST = 2048; // of a side; a larger picture is made smaller before it is sent
const HALF = 128;
const TINT = "#e8590c";

let given = null; // { name, image, blob, strokes }
let stroke = null;
let cursor = null; // where the brush is, in pixels of the picture
const mask = new OffscreenCanvas(1, 1);

// Show a picture that was dropped, chosen or drawn; raises where the browser cannot read it.
export async function open(blob, name) {
  const image = await createImageBitmap(blob);
  const scale = Math.min(1, LARGEST / Math.max(image.width, image.height));
  const canvas = $("canvas");
  canvas.width = mask.width = Math.max(1, Math.round(image.width * scale));
  canvas.height = mask.height = Math.max(1, Math.round(image.height * scale));
  given = { name, image, blob: scale < 1 ? null : blob, strokes: [] };
  cursor = { x: canvas.width / 2, y: canvas.height / 2 };
  $("editor").hidden = false;
  $("start").open = true;
  $("given").textContent = `${name}, ${image.width} x ${image.height}`;
  chooseHow();
}

export function close() {
  given = null;
  $("editor").hidden = true;
  $("picture").value = "";
}

// What a request takes of it: fields, and files; null where there is no picture.
export async function taken() {
  if (!given) return null;
  const canvas = new OffscreenCanvas(mask.width, mask.height);
  const context = canvas.getContext("2d");
  context.drawImage(given.image, 0, 0, mask.width, mask.height);
  const edit = { name: given.name, image: given.blob ?? (await canvas.convertToBlob()), fields: {} };
  for (const field of [...howFields(), "fit"]) if ($(field).value !== "") edit.fields[field] = $(field).value;
  if ($("how").value === "mask") {
    const painted = maskPixels();
    const clear = context.getImageData(0, 0, mask.width, mask.height).data;
    const bars = edit.fields.fit === "contain"; // which are drawn, whatever is painted
    if (bars || painted.some((value) => value)) edit.mask = await asMask(painted, clear);
    else if (!clear.some((value, at) => at % 4 === 3 && value < HALF)) {
      const message = "mask: paint over what is to be drawn anew";
      throw Object.assign(new Error(message), { refusal: { message, param: "mask", status: 400 } });
    }
  }
  return edit;
}

function howFields() {
  return $("how").value === "vary" ? ["vary"] : ["anew"];
}

function maskPixels() {
  const data = mask.getContext("2d").getImageData(0, 0, mask.width, mask.height).data;
  return Uint8Array.from({ length: data.length / 4 }, (_, at) => data[4 * at + 3] >= HALF);
}

// As OpenAI has it: a picture of the same size, transparent where it is painted over, or is transparent itself.
async function asMask(painted, clear) {
  const image = new ImageData(mask.width, mask.height);
  image.data.fill(255);
  painted.forEach((value, at) => {
    if (value || clear[4 * at + 3] < HALF) image.data[4 * at + 3] = 0;
  });
  const canvas = new OffscreenCanvas(mask.width, mask.height);
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas.convertToBlob();
}

// Painting: strokes are kept, so that the last one can be taken back.

function width() {
  return (Number($("brush").value) / 100) * Math.max(mask.width, mask.height);
}

function begin(point) {
  stroke = { points: [point], width: width(), erase: $("eraser").getAttribute("aria-pressed") === "true" };
  given.strokes.push(stroke);
  show();
}

function replay() {
  const context = mask.getContext("2d");
  context.clearRect(0, 0, mask.width, mask.height);
  context.lineCap = context.lineJoin = "round";
  context.strokeStyle = context.fillStyle = TINT;
  for (const { points, width, erase, clear } of given.strokes) {
    if (clear) {
      context.clearRect(0, 0, mask.width, mask.height);
      continue;
    }
    context.globalCompositeOperation = erase ? "destination-out" : "source-over";
    context.lineWidth = width;
    context.beginPath();
    context.arc(points[0].x, points[0].y, width / 2, 0, 2 * Math.PI); // a line that goes nowhere leaves no dot
    context.fill();
    context.beginPath();
    context.moveTo(points[0].x, points[0].y);
    for (const { x, y } of points) context.lineTo(x, y);
    context.stroke();
  }
  context.globalCompositeOperation = "source-over";
}

function show() {
  if (!given) return;
  replay();
  const context = $("canvas").getContext("2d");
  context.clearRect(0, 0, mask.width, mask.height);
  context.drawImage(given.image, 0, 0, mask.width, mask.height);
  const painting = $("how").value === "mask";
  if (!painting) return;
  context.globalAlpha = 0.6;
  context.drawImage(mask, 0, 0);
  context.globalAlpha = 1;
  context.lineWidth = Math.max(1, mask.width / 250);
  for (const [colour, more] of [["#000", 0], ["#fff", context.lineWidth]]) {
    context.strokeStyle = colour;
    context.beginPath();
    context.arc(cursor.x, cursor.y, width() / 2 + more, 0, 2 * Math.PI);
    context.stroke();
  }
  $("undo").disabled = $("clear").disabled = !given.strokes.length;
}

function chooseHow() {
  for (const part of document.querySelectorAll("[data-how]")) part.hidden = part.dataset.how !== $("how").value;
  show();
}

function placeOf(event) {
  const canvas = $("canvas");
  const box = canvas.getBoundingClientRect();
  return {
    x: ((event.clientX - box.left) / box.width) * canvas.width,
    y: ((event.clientY - box.top) / box.height) * canvas.height,
  };
}

function undo() {
  given.strokes.pop();
  show();
}

function resize(by) {
  $("brush").value = Number($("brush").value) + by;
  show();
}

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function onKey(event) {
  if (!given || $("how").value !== "mask") return;
  const key = event.key;
  if (key in ARROWS) {
    const before = { ...cursor };
    const [x, y] = ARROWS[key];
    cursor.x = Math.min(Math.max(cursor.x + (x * width()) / 4, 0), mask.width);
    cursor.y = Math.min(Math.max(cursor.y + (y * width()) / 4, 0), mask.height);
    if (event.shiftKey) {
      begin(before);
      stroke.points.push({ ...cursor });
    }
  } else if (key === " ") begin({ ...cursor });
  else if (key === "[") resize(-2);
  else if (key === "]") resize(2);
  else if (key.toLowerCase() === "z" && (event.ctrlKey || event.metaKey)) undo();
  else return;
  event.preventDefault();
  stroke = null;
  show();
}

export function start() {
  const canvas = $("canvas");
  canvas.onpointerdown = (event) => {
    if (event.button !== 0 || $("how").value !== "mask") return;
    canvas.setPointerCapture(event.pointerId);
    cursor = placeOf(event);
    begin({ ...cursor });
  };
  canvas.onpointermove = (event) => {
    if (!given) return;
    cursor = placeOf(event);
    if (stroke) stroke.points.push({ ...cursor });
    show();
  };
  canvas.onpointerup = canvas.onpointercancel = () => {
    stroke = null;
  };
  canvas.onkeydown = onKey;
  $("brush").oninput = show;
  $("how").onchange = chooseHow;
  $("undo").onclick = undo;
  $("clear").onclick = () => {
    given.strokes.push({ clear: true });
    show();
  };
  $("eraser").onclick = () => {
    const erases = $("eraser").getAttribute("aria-pressed") === "true";
    $("eraser").setAttribute("aria-pressed", String(!erases));
  };
  $("no-picture").onclick = close;
}

// Before and after, one over the other.

export async function compare(edit, after) {
  const before = $("before");
  URL.revokeObjectURL(before.src);
  before.src = URL.createObjectURL(edit.image);
  before.style.objectFit = { contain: "contain", stretch: "fill" }[edit.fields.fit] ?? "cover";
  $("after").src = after;
  divide(50);
  $("compare").showModal();
}

export function divide(percent) {
  $("divider").value = percent;
  $("before").style.clipPath = `inset(0 ${100 - percent}% 0 0)`;
}
