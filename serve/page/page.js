// Draws with the server's own API, as any client does. Everything is kept in this tab.

import * as editor from "./editor.js";
import { textOf } from "./png.js";
import { ask, eventsOf } from "./server.js";

const $ = (id) => document.getElementById(id);
const SETTINGS = [
  ["guidance", "Guidance", "number"],
  ["top_k", "Top-k", "number"],
  ["top_p", "Top-p", "number"],
  ["steps", "Steps", "text"],
  ["smooth", "Smooth", "switch"],
  ["residual", "Residual", "switch"],
];
const KEPT = "hart-form";
const MOST_SEED = 2 ** 32;
let models = [];
const queue = [];
let stopping = null;
let emptying = false;

// The form.

function fieldFor([name, words, kind]) {
  const label = document.createElement("label");
  label.textContent = `${words} `;
  const input = document.createElement(kind === "switch" ? "select" : "input");
  input.id = input.name = name;
  if (kind === "switch") {
    for (const [value, said] of [["", "model's"], ["true", "on"], ["false", "off"]]) {
      input.append(new Option(said, value));
    }
  } else {
    input.type = kind;
    input.step = "any";
  }
  label.append(input);
  const error = document.createElement("p");
  error.className = "error";
  error.dataset.field = name;
  error.setAttribute("role", "alert");
  return [label, error];
}

function request() {
  const asked = { prompt: "", model: $("model").value, n: Number($("n").value) };
  if (drawsClasses(asked.model)) asked.label = $("label").value;
  else asked.prompt = $("prompt").value;
  if ($("seed").value !== "") asked.seed = Number($("seed").value);
  for (const [name, , kind] of SETTINGS) {
    const value = $(name).value;
    if (value === "") continue;
    asked[name] = kind === "number" ? Number(value) : kind === "switch" ? value === "true" : value;
  }
  return asked;
}

function fill(asked) {
  if (models.some((model) => model.id === asked.model)) chooseModel(asked.model);
  if (drawsClasses($("model").value)) $("label").value = asked.label || asked.prompt || "";
  else $("prompt").value = asked.prompt ?? $("prompt").value;
  $("n").value = asked.n ?? 1;
  $("seed").value = asked.seed ?? "";
  for (const [name] of SETTINGS) $(name).value = $(name).parentElement.hidden ? "" : (asked[name] ?? "");
  keep();
}

function keep() {
  sessionStorage.setItem(KEPT, JSON.stringify(request()));
}

function drawsClasses(name) {
  return Boolean(models.find((model) => model.id === name)?.classes);
}

function takesPictures(name) {
  return Boolean(models.find((model) => model.id === name)?.edits);
}

function chooseModel(name) {
  $("model").value = name;
  const classes = drawsClasses(name);
  for (const part of document.querySelectorAll("[data-classes]")) part.hidden = !classes;
  for (const part of document.querySelectorAll("[data-texts]")) part.hidden = classes;
  $("start").hidden = !takesPictures(name);
  if ($("start").hidden) editor.close();
  if (classes) listClasses(name);
  const defaults = models.find((model) => model.id === name)?.settings ?? {};
  for (const [setting, , kind] of SETTINGS) {
    const value = defaults[setting];
    const lacking = !(setting in defaults);
    $(setting).parentElement.hidden = lacking;
    if (lacking) $(setting).value = "";
    if (kind === "switch") $(setting).options[0].text = `model's (${value ? "on" : "off"})`;
    else $(setting).placeholder = value ?? "published rule";
  }
}

async function listClasses(name) {
  const model = await (await ask(`v1/models/${encodeURIComponent(name)}`)).json();
  if ($("model").value !== name) return;
  $("classes").replaceChildren(...model.class_names.map((words) => new Option(words)));
}

function tell(refusal) {
  for (const place of document.querySelectorAll("#form .error")) place.textContent = "";
  for (const input of $("form").elements) input.removeAttribute("aria-invalid");
  if (!refusal) return;
  const place = document.querySelector(`#form .error[data-field="${refusal.param}"]`) ?? $("refusal");
  place.textContent = refusal.message;
  for (const part of ["settings", "start"]) if (place.closest(`#${part}`)) $(part).open = true;
  const input = document.getElementById(refusal.param);
  if (input && $("form").contains(input)) {
    input.setAttribute("aria-invalid", "true");
    input.focus();
  }
}

function state(words, title) {
  $("offer").hidden = true;
  $("status").textContent = words;
  document.title = title ? `${title} - HART` : "HART";
}

// What is asked for while something is drawn waits for its turn, and can be taken back.

async function draw(asked) {
  queue.push(asked);
  showQueue();
  if (emptying) return;
  emptying = true;
  let served = true;
  while (served && queue.length) {
    const next = queue.shift();
    showQueue();
    served = await drawNow(next);
  }
  emptying = false;
}

function showQueue() {
  $("queue").replaceChildren(
    ...queue.map((asked) => {
      const item = document.createElement("li");
      const words = document.createElement("span");
      const from = asked.edit ? ` · from ${asked.edit.name}` : "";
      words.textContent = `${asked.label || asked.prompt}${from} · ${asked.n === 1 ? "1 picture" : `${asked.n} pictures`} `;
      const remove = button("Remove", () => {
        queue.splice(queue.indexOf(asked), 1);
        showQueue();
      });
      item.append(words, remove);
      return item;
    }),
  );
  $("queue").hidden = !queue.length;
}

// Whether the server would draw something else.
async function drawNow(asked) {
  tell(null);
  const mine = (stopping = new AbortController());
  const model = models.find((one) => one.id === asked.model) ?? models[0];
  const places = [];
  $("now").replaceChildren();
  busy(true);
  state("Waiting for its turn.", "waiting");
  let complete = 0;
  let cut = "";
  try {
    if (asked.seed > Number.MAX_SAFE_INTEGER) {
      const message = `seed: a page knows numbers up to ${Number.MAX_SAFE_INTEGER}; another client can ask for larger ones`;
      throw Object.assign(new Error(message), { refusal: { message, param: "seed", status: 400 } });
    }
    const response = await send(asked, { stream: true, partial_images: Math.min(model?.scales ?? 3, 16) }, mine.signal);
    for await (const event of eventsOf(response)) {
      if (event.error) throw Object.assign(new Error(event.error.message), { refusal: event.error });
      const index = event.image_index;
      const url = `data:image/${event.output_format};base64,${event.b64_json}`;
      if (event.type.endsWith("completed")) {
        complete += 1;
        if (event.revised_prompt) cut = ` The model reads no further than “…${event.revised_prompt.slice(-40)}”.`;
        places[index]?.remove();
        delete places[index];
        addPicture({ ...asked, n: 1, seed: event.seed, model: model.id }, url);
      } else {
        places[index] ??= placeFor(index);
        places[index].src = url;
        places[index].alt = `Picture ${index + 1} at scale ${event.scale + 1} of ${event.scales}`;
        places[index].dataset.scale = event.scale;
        $("progress").value = (complete + (event.scale + 1) / (event.scales + 1)) / asked.n;
        state(`Scale ${event.scale + 1} of ${event.scales}.`, `${event.scale + 1}/${event.scales}`);
      }
    }
    if (complete < asked.n) throw new Error("The server ended in the middle of it.");
    state(`${complete === 1 ? "Done." : `${complete} pictures are done.`}${cut}`, "done");
    return true;
  } catch (error) {
    if (mine.signal.aborted) {
      state("Stopped.", "");
      return true;
    }
    tell(error.refusal ?? { message: `${error.message || "The server is not there."}` });
    state("", "failed");
    return error.refusal?.status === 400;
  } finally {
    busy(false);
    $("now").replaceChildren();
    $("now").hidden = true;
  }
}

function send({ edit, ...asked }, more, signal) {
  const fields = { ...asked, ...more };
  if (!edit) {
    const headers = { "Content-Type": "application/json" };
    return ask("v1/images/generations", { method: "POST", headers, body: JSON.stringify(fields), signal });
  }
  const body = new FormData();
  for (const [name, value] of Object.entries({ ...fields, ...edit.fields })) body.append(name, value);
  body.append("image", edit.image, "image");
  if (edit.mask) body.append("mask", edit.mask, "mask.png");
  return ask("v1/images/edits", { method: "POST", body, signal });
}

function busy(drawing) {
  $("stop").hidden = $("progress").hidden = !drawing;
  $("progress").value = 0;
  if (!drawing) stopping = null;
}

function placeFor(index) {
  const image = new Image();
  image.className = "preview";
  $("now").hidden = false;
  $("now").append(image);
  return image;
}

// The gallery.

function addPicture(asked, url) {
  const item = document.createElement("li");
  const image = new Image();
  const drawn = asked.label || asked.prompt;
  image.src = url;
  image.alt = drawn;
  const open = button("", () => enlarge(image));
  open.className = "open";
  open.setAttribute("aria-label", `Full size: ${drawn}`);
  open.append(image);
  const what = document.createElement("p");
  what.className = "what";
  what.textContent = `${drawn} · seed ${asked.seed}${asked.edit ? ` · from ${asked.edit.name}` : ""}`;
  what.title = SETTINGS.map(([name]) => `${name}: ${asked[name] ?? "model's"}`).join("\n");
  const does = document.createElement("div");
  does.className = "does";
  const save = document.createElement("a");
  save.href = url;
  save.download = `hart-${asked.seed}.png`;
  save.textContent = "Download";
  const again = () => {
    fill(asked);
    draw(asked);
  };
  const sameSeed = () => {
    fill(asked);
    const words = drawsClasses(asked.model) ? $("label") : $("prompt");
    words.select();
    words.focus();
  };
  does.append(save, button("Draw again", again), button("Same seed, other prompt", sameSeed));
  if (asked.edit) does.append(button("Compare", () => editor.compare(asked.edit, url)));
  if (takesPictures(asked.model)) {
    const name = `seed ${asked.seed}`;
    does.append(button("Change a part", () => startFrom(blobOf(url), name)));
  }
  does.append(button("Remove", () => item.remove()));
  item.dataset.seed = asked.seed;
  item.append(open, what, does);
  $("gallery").prepend(item);
}

function blobOf(url) {
  const [head, data] = url.split(",");
  return new Blob([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], { type: head.slice(5, head.indexOf(";")) });
}

function button(words, pressed) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = words;
  made.onclick = pressed;
  return made;
}

function enlarge(image) {
  const large = $("large").querySelector("img");
  large.src = image.src;
  large.alt = image.alt;
  $("large").showModal();
}

// A PNG of ours carries how it was made; that is taken over, and it can be started from like any other.

async function dropped(file) {
  let made;
  try {
    made = JSON.parse(textOf(new Uint8Array(await file.arrayBuffer()), "hart"));
  } catch {
    await startFrom(file, file.name);
    return;
  }
  fill({ prompt: made.prompt, seed: made.seed, ...made.settings, n: 1, model: made.bundle });
  $("settings").open = true;
  tell(null);
  state(`Settings of ${file.name} are taken over.`, "");
  $("offer").hidden = !takesPictures($("model").value);
  $("offer").onclick = () => startFrom(file, file.name);
}

async function startFrom(blob, name) {
  tell(null);
  state("", "");
  if (!takesPictures($("model").value)) {
    tell({ message: `${$("model").value} starts from no pictures: it has no encoder.` });
    return;
  }
  try {
    await editor.open(blob, name);
    $("canvas").focus();
  } catch {
    tell({ message: `${name} is no picture that can be read here.` });
  }
}

// The beginning.

$("fields").append(...SETTINGS.flatMap(fieldFor));
$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  keep();
  const asked = request();
  try {
    const edit = await editor.taken();
    draw(edit ? { ...asked, edit } : asked);
  } catch (error) {
    tell(error.refusal ?? { message: error.message });
  }
});
$("form").addEventListener("input", keep);
$("model").addEventListener("change", () => {
  chooseModel($("model").value);
  keep();
});
$("dice").onclick = () => {
  $("seed").value = Math.floor(Math.random() * MOST_SEED);
  keep();
};
$("stop").onclick = () => stopping?.abort();
$("large").onclick = () => $("large").close();
$("picture").onchange = () => {
  const [file] = $("picture").files;
  if (file) startFrom(file, file.name);
};
$("divider").oninput = () => editor.divide(Number($("divider").value));
editor.start();
addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
});
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
addEventListener("dragleave", () => document.body.classList.remove("dropping"));
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  if (event.dataTransfer.files.length) dropped(event.dataTransfer.files[0]);
});

try {
  const listed = await (await ask("v1/models")).json();
  models = listed.data;
  $("model").append(...models.map((model) => new Option(`${model.id} (${model.size})`, model.id)));
  chooseModel(models[0].id);
  fill(JSON.parse(sessionStorage.getItem(KEPT) ?? "{}"));
} catch (error) {
  tell({ message: error.message });
}
