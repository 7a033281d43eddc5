// The page at "/": an image, an instruction, its blueprint, the painted result, and the way back.
//
// Whatever comes from outside (texts of users, models and servers) is set as textContent or as the
// value of a field, never as markup.

const SECTIONS = [
  ["instruction", "Edit Instruction"],
  ["global_layout", "Global Layout Perception"],
  ["local_objects", "Local Object Perception"],
  ["edit_area", "Edit Area Localization"],
  ["imagination", "Edited Image Imagination"],
];
const PARTIAL_IMAGES = 3;
const KEY = "dim-api-key";
const MASK_SIDE = 1600; // longest side of the canvas that the mask is drawn on
const SMALL = 256; // images up to this many pixels are shown with their pixels

const $ = (id) => document.getElementById(id);

const state = {
  mode: "edit",
  steps: [], // every image that was opened, edited or created, oldest first
  at: null, // the step whose image is shown, and is the source of the next edit
  plannedFor: null, // the instruction that the blueprint in the form belongs to
  marking: false,
  work: null, // the AbortController of what is being done
  checks: 0,
  contributions: "never", // whether edits may be kept for training: never, ask or always
  key: remembered(),
};

// ---------------------------------------------------------------------------------------- asking

/** What went wrong, as one sentence that a person can read. */
class Failure extends Error {
  constructor(message, { status = 0, field = null } = {}) {
    super(message);
    this.status = status;
    this.field = field;
  }
}

/** The response of the server to a form (a Blob of `formOf`) or to JSON (anything else). */
async function ask(path, body, signal, method = "GET") {
  const headers = state.key ? { Authorization: `Bearer ${state.key}` } : {};
  const options = {
    method, signal, headers, cache: "no-store", redirect: "error",
    referrerPolicy: "same-origin", // else some browsers send "Origin: null", which servers refuse
  };
  if (body instanceof Blob) Object.assign(options, { method: "POST", body });
  else if (body !== undefined) {
    headers["Content-Type"] = "application/json";
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Failure("The server cannot be reached.");
  }
  if (!response.ok) throw await failureOf(response);
  return response;
}

async function failureOf(response) {
  const body = await response.json().catch(() => null);
  const error = body?.error ?? {};
  let message = sentence(error.message) || `The server answered with status ${response.status}.`;
  const wait = Number(response.headers.get("Retry-After"));
  if (wait > 0) message = `${message.replace(/\.$/, "")} (try again in ${wait} s).`;
  return new Failure(message, { status: response.status, field: error.param });
}

/** `text` with a capital at its start and a full stop at its end. */
function sentence(text) {
  const said = String(text ?? "").trim();
  if (!said) return "";
  return said[0].toUpperCase() + said.slice(1) + (/[.!?…)]$/.test(said) ? "" : ".");
}

/** [name, data] of every event of a stream; a whole answer counts as its last events. */
async function* eventsOf(response) {
  if (!response.headers.get("Content-Type")?.startsWith("text/event-stream")) {
    yield* wholeAnswer(await response.json());
    return;
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      buffer += done ? "\n\n" : value;
      const blocks = buffer.split(/\r?\n\r?\n/);
      buffer = blocks.pop();
      for (const block of blocks) {
        const event = readEvent(block);
        if (event) yield event;
      }
      if (done) return;
    }
  } catch (error) {
    if (error instanceof TypeError) throw new Failure("The connection to the server broke off.");
    throw error;
  } finally {
    reader.cancel().catch(() => {});
  }
}

function* wholeAnswer(answer) {
  if (answer.object === "blueprint") yield ["blueprint.done", answer];
  for (const image of answer.data ?? []) yield ["image.completed", image];
}

function readEvent(block) {
  const lines = block.split(/\r?\n/);
  const field = (name) =>
    lines.filter((line) => line.startsWith(`${name}:`)).map((line) => line.slice(name.length + 1));
  const text = field("data").join("\n").trim();
  if (!text || text === "[DONE]") return null;
  const data = JSON.parse(text);
  const name = field("event").at(-1)?.trim() || data.type || "";
  if (name === "error" || data.error) {
    throw new Failure(sentence(data.error?.message ?? data.message) || "The server failed.", {
      field: data.error?.param,
    });
  }
  return [name, data];
}

// ------------------------------------------------------------------------------------- blueprints

const sectionField = (name) => $(`section-${name}`);

/** The sections of a blueprint's text, however much of it has been written so far. */
function readBlueprint(text) {
  const heads = SECTIONS.map(([, title], index) => `${index + 1}. ${title}:`);
  const values = {};
  let at = 0;
  SECTIONS.forEach(([name], index) => {
    const start = text.indexOf(heads[index], at);
    if (start < 0) return;
    at = start + heads[index].length;
    const next = heads[index + 1] ? text.indexOf(`\n${heads[index + 1]}`, at) : -1;
    values[name] = withoutBegunHeading(text.slice(at, next < 0 ? undefined : next), heads[index + 1]);
  });
  return Object.keys(values).length ? values : { instruction: text.trim() };
}

function withoutBegunHeading(text, next) {
  const lastLine = text.slice(text.lastIndexOf("\n") + 1);
  return (next?.startsWith(lastLine) ? text.slice(0, text.length - lastLine.length) : text).trim();
}

/** The text of the blueprint in the form; "" when all of its sections are blank. */
function writtenBlueprint() {
  const values = SECTIONS.map(([name]) => sectionField(name).value.trim());
  if (values.every((value) => !value)) return "";
  return values
    .map((value, index) => `${index + 1}. ${SECTIONS[index][1]}: ${value}`)
    .join("\n\n");
}

function showBlueprint(text) {
  const values = text ? readBlueprint(text) : {};
  $("sections").hidden = !text; // first of all: what is hidden has no height to fit
  for (const [name] of SECTIONS) {
    const field = sectionField(name);
    field.value = values[name] ?? "";
    fit(field);
  }
  markWrong(null, "");
}

function setBlueprint(text, instruction) {
  state.plannedFor = text ? instruction : null;
  showBlueprint(text);
  renderBlueprint();
}

/** Whether the blueprint in the form is one for the instruction beside it. */
const blueprintApplies = () =>
  state.plannedFor !== null && state.plannedFor === $("prompt").value.trim();

function renderBlueprint() {
  const text = writtenBlueprint();
  const stale = Boolean(text) && !blueprintApplies();
  const plain = $("designer").value === "none";
  const next = $("prompt").value.trim() !== "";
  let note = "Before it paints, the model writes down what to do. Have it written to read and change it first.";
  if (stale && next) note = `Written for “${shortened(state.plannedFor ?? "", 80)}”. Painting another instruction writes a new one.`;
  else if (stale) note = "This was painted. The next instruction gets a blueprint of its own.";
  else if (text) note = "This is what is painted. Change what you like.";
  else if (plain) note = "The instruction itself is painted, without a blueprint.";
  $("blueprint-note").textContent = state.work ? "" : note;
  $("blueprint-note").hidden = Boolean(state.work);
  $("sections").classList.toggle("stale", stale);
  $("keep").hidden = !(stale && next) || Boolean(state.work);
  $("discard").hidden = $("sections").hidden || Boolean(state.work);
  $("by-hand").hidden = !$("sections").hidden || Boolean(state.work);
  $("plan").textContent = text && !stale ? "Rewrite blueprint" : "Write blueprint";
}

function markWrong(name, message) {
  for (const [each] of SECTIONS) {
    const wrong = each === name;
    sectionField(each).setAttribute("aria-invalid", String(wrong));
    $(`wrong-${each}`).textContent = wrong ? message : "";
  }
  $("blueprint-error").textContent = name ? "" : message;
}

/** Whether the server takes the blueprint; the section that it does not take is marked. */
async function checkBlueprint(signal) {
  const text = writtenBlueprint();
  const number = ++state.checks;
  if (!text) {
    markWrong(null, "");
    return true;
  }
  const body = { blueprint: text, prompt: $("prompt").value.trim() || undefined };
  let answer;
  try {
    answer = await (await ask("v1/blueprints/check", body, signal)).json();
  } catch (error) {
    if (error.status === 404 || error.status === 405) return true; // older servers paint it as it is
    throw error;
  }
  if (number !== state.checks) return answer.valid; // changed meanwhile: a later answer counts
  const known = SECTIONS.some(([name]) => name === answer.section);
  markWrong(!answer.valid && known ? answer.section : null, answer.valid ? "" : sentence(answer.message));
  return answer.valid;
}

function buildSections() {
  SECTIONS.forEach(([name, title], index) => {
    const label = element("label", { htmlFor: `section-${name}` }, `${index + 1}. ${title}`);
    const field = element("textarea", { id: `section-${name}`, rows: 1 });
    const wrong = element("p", { id: `wrong-${name}`, className: "wrong" });
    field.setAttribute("aria-describedby", wrong.id);
    wrong.setAttribute("aria-live", "polite");
    field.addEventListener("input", () => {
      state.plannedFor = $("prompt").value.trim(); // whoever writes here means this instruction
      fit(field);
      renderBlueprint();
      checkSoon();
    });
    $("sections").append(label, field, wrong);
  });
}

const checkSoon = later(() => {
  if (!state.work) checkBlueprint().catch((error) => tell(error));
}, 500);

// ------------------------------------------------------------------------------------ the requests

/** What the form says beside prompt, image and blueprint; blank fields say nothing. */
function settings() {
  const given = {};
  const edits = state.mode === "edit" ? ["rounds", "best_of"] : [];
  for (const name of ["n", ...edits, "seed", "steps", "guidance_scale"]) {
    const field = $(name);
    if (field.disabled) continue;
    if (!field.checkValidity()) {
      $("more").open = true;
      field.focus();
      throw new Failure(`${labelOf(field)}: ${sentence(field.validationMessage)}`);
    }
    if (field.value !== "") given[name] = Number(field.value);
  }
  for (const name of ["n", ...edits]) if (given[name] === 1) delete given[name];
  for (const name of ["size", "negative_prompt"]) {
    const text = $(name).value.trim();
    if (text) given[name] = text;
  }
  return given;
}

/** Whether the designer is to look at what is painted: then one image is the answer, the best. */
const reviewed = () =>
  state.mode === "edit" && (Number($("rounds").value) > 1 || Number($("best_of").value) > 1);

const labelOf = (field) => field.labels[0].firstChild.textContent.trim();

/** What the form says of consent, where that is not what the server takes as said. */
function consent() {
  const given = $("consent").checked;
  const asked = state.contributions !== "never" && given !== (state.contributions === "always");
  return asked ? { consent: given } : {};
}

function designer() {
  return $("designer-field").hidden ? {} : { designer: $("designer").value };
}

/** A multipart body. FormData is none for us: it would turn every line end of a blueprint to CRLF. */
function formOf(fields, files) {
  const boundary = Array.from(crypto.getRandomValues(new Uint32Array(6)), String).join("-");
  const parts = [];
  const add = (heading, content) => {
    parts.push(`--${boundary}\r\nContent-Disposition: form-data; ${heading}\r\n\r\n`, content, "\r\n");
  };
  for (const [name, file] of Object.entries(files)) {
    if (file) add(`name="${name}"; filename="${fileName(name, file)}"\r\nContent-Type: ${typeOf(file)}`, file);
  }
  for (const [name, value] of Object.entries(fields)) add(`name="${name}"`, String(value));
  return new Blob([...parts, `--${boundary}--\r\n`], { type: `multipart/form-data; boundary=${boundary}` });
}

const typeOf = (file) => (/^[a-z]+\/[\w.+-]+$/.test(file.type) ? file.type : "application/octet-stream");

function fileName(name, blob) {
  const kind = blob.type.match(/^image\/([a-z]+)/)?.[1] ?? "bin";
  return `${name}.${kind === "jpeg" ? "jpg" : kind}`;
}

/** Do `work` with an AbortSignal: one at a time, its failure told, the form put back at its end. */
async function busy(said, work) {
  if (state.work) return;
  const control = new AbortController();
  state.work = control;
  tell(null);
  say(said);
  render();
  try {
    await work(control.signal);
  } catch (error) {
    if (control.signal.aborted) say("Cancelled.");
    else {
      say("");
      tell(error, () => busy(said, work));
    }
  } finally {
    state.work = null;
    render();
  }
}

function writeBlueprint() {
  const prompt = $("prompt").value.trim();
  if (!ready(prompt)) return;
  const before = [writtenBlueprint(), state.plannedFor];
  busy("Writing the blueprint…", async (signal) => {
    let text = "";
    try {
      const body = formOf({ prompt, ...designer(), stream: true }, { image: source().blob });
      for await (const [name, data] of eventsOf(await ask("v1/blueprints", body, signal))) {
        if (name.endsWith("delta")) showBlueprint((text += data.delta));
        if (name.endsWith("done")) setBlueprint((text = data.blueprint), prompt);
      }
      if (state.plannedFor !== prompt || !text) {
        throw new Failure("The connection ended before the blueprint was finished.");
      }
    } catch (error) {
      setBlueprint(...before);
      throw error;
    }
    say("The blueprint is written. Read it, change it, then paint.");
  });
}

function paint() {
  const prompt = $("prompt").value.trim();
  if (!ready(prompt)) return;
  setMarking(false);
  if (state.mode === "create") busy("Painting…", (signal) => create(prompt, signal));
  else busy("Painting…", (signal) => edit(prompt, signal));
}

/** Whether there is something to edit and something to do; else says what is missing. */
function ready(prompt) {
  if (state.work) return false;
  if (state.mode === "edit" && !state.at) {
    tell(new Failure("Choose an image first."));
    $("file").focus();
    return false;
  }
  if (!prompt) {
    tell(new Failure(state.mode === "edit" ? "Say what should change." : "Say what to paint."));
    $("prompt").focus();
    return false;
  }
  return true;
}

async function edit(prompt, signal) {
  const own = settings();
  const before = [writtenBlueprint(), state.plannedFor];
  const given = blueprintApplies() ? writtenBlueprint() : "";
  if (given && !(await checkBlueprint(signal))) {
    document.querySelector('#sections [aria-invalid="true"]')?.focus();
    throw new Failure("The blueprint cannot be painted as it is.");
  }
  const fields = { prompt, ...own, ...designer(), ...consent(), ...(given && { blueprint: given }) };
  const mask = await maskFile();
  const step = {
    kind: "edited", from: state.at, fromImage: source(), prompt, fields, mask: keptMask(), images: [],
  };
  // Where the designer looks at images, those are what is seen on the way.
  const previews = reviewed() ? {} : { partial_images: PARTIAL_IMAGES };
  const form = formOf({ ...fields, stream: true, ...previews }, { image: source().blob, mask });
  if (!given) {
    if ($("designer").value !== "none") say("Writing the blueprint…");
    setBlueprint("", null);
  }
  try {
    const written = await follow(await ask("v1/images/edits", form, signal), step, prompt, signal);
    step.blueprint = given || written;
  } catch (error) {
    // A blueprint that was written whole before the failure was paid for: it stays.
    if (state.plannedFor !== prompt) setBlueprint(...before);
    throw error;
  }
  finish(step);
}

async function create(prompt, signal) {
  const fields = { prompt, ...settings() };
  const step = { kind: "created", from: null, fromImage: null, prompt, fields, images: [] };
  const body = { ...fields, stream: true, partial_images: PARTIAL_IMAGES };
  await follow(await ask("v1/images/generations", body, signal), step, prompt, signal);
  finish(step);
}

/** Show what a stream tells while it is painted; fills `step.images`, in the order of the seeds. */
async function follow(response, step, prompt, signal) {
  const wanted = step.fields.n ?? 1;
  const images = [];
  const looked = []; // the images that the designer looked at, in its order
  let text = "";
  let blueprint = null;
  try {
    for await (const [name, data] of eventsOf(response)) {
      if (name.endsWith("blueprint.delta")) {
        say("Writing the blueprint…");
        showBlueprint((text += data.delta));
      } else if (name.endsWith("blueprint.done")) {
        blueprint = data.blueprint;
        setBlueprint(blueprint, prompt);
        say("Painting…");
      } else if (name.endsWith("partial_image")) {
        say(`Painting, preview ${(data.partial_image_index ?? 0) + 1}…`);
        showPreview(await imageOf(data));
      } else if (name.endsWith(".review")) {
        const image = Object.assign(await imageOf(data), { seed: data.review.seed, review: data.review });
        looked.push(image);
        showPreview(await imageOf(data)); // of its own: a preview is thrown away
        say(`${verdictOf(data.review)}. ${data.review.accepted ? "" : "Painting again…"}`.trim());
      } else if (name.endsWith("completed")) {
        blueprint ??= data.blueprint ?? null;
        const place = Number.isInteger(data.image_index) ? data.image_index : images.length;
        images[place] = await imageOf(data);
        if (wanted > 1) say(`Painting, ${images.flat().length} of ${wanted} done…`);
      }
    }
  } catch (error) {
    // What was painted before a failure is kept, unless it was cancelled.
    if (signal.aborted || !(images.length || looked.length)) throw error;
    step.failure = error;
  } finally {
    showPreview(null);
  }
  const painted = images.flat(); // without the places of those that did not come
  step.images = looked.length ? looked : painted;
  if (looked.length) {
    step.chosen = bestOf(looked, painted[0]);
    looked[step.chosen].contribution = painted[0]?.contribution;
  }
  if (looked.length && !painted.length) {
    step.failure ??= new Failure("The connection ended before the best image was chosen.");
  }
  if (!step.images.length) throw new Failure("The connection ended before the image was finished.");
  if (step.images.length < wanted) {
    step.failure ??= new Failure(`Only ${step.images.length} of ${wanted} images came before the connection ended.`);
  }
  return blueprint ?? "";
}

/** Which of the images that the designer looked at is the answer; without one, that of most points. */
function bestOf(looked, answer) {
  const place = looked.findIndex((image) => image.seed === answer?.seed);
  if (place >= 0) return place;
  const points = looked.map((image) => image.review.score ?? -1);
  return points.indexOf(Math.max(...points));
}

/** What the designer thought of an image, in a few words. */
function verdictOf(review) {
  const score = typeof review.score === "number" ? `${Number(review.score.toFixed(1))} of 10` : "no review";
  return `Round ${review.round}: ${score}${review.accepted ? ", accepted" : ""}`;
}

/** The text that the image which is shown was painted from. */
const blueprintOf = (step) => step.images[step.chosen].review?.blueprint ?? step.blueprint;

function finish(step) {
  step.chosen ??= 0;
  state.steps.push(step);
  if (step.kind === "edited") setBlueprint(blueprintOf(step), step.prompt);
  select(step);
  // Whoever writes the next instruction meanwhile keeps it.
  if (step.kind === "edited" && $("prompt").value.trim() === step.prompt) $("prompt").value = "";
  renderBlueprint();
  const rounds = step.images.at(-1).review?.round;
  let many = step.images.length > 1 ? `${step.images.length} images are painted` : "Painted";
  if (rounds) many = `Painted in ${rounds === 1 ? "1 round" : `${rounds} rounds`}`;
  if (step.failure) tell(step.failure);
  say(step.kind === "edited" ? `${many}. The next edit starts from this result.` : `${many}.`);
}

async function imageOf(data) {
  const bytes = Uint8Array.from(atob(data.b64_json ?? ""), (letter) => letter.charCodeAt(0));
  const type = `image/${data.output_format ?? "png"}`;
  const image = await opened(new Blob([bytes], { type }), "The server's answer holds no image.");
  return Object.assign(image, { seed: data.seed, contribution: data.contribution });
}

/** Say that the edit which is shown may be trained on; once that is said, take it back. */
async function acceptOrTakeBack() {
  const image = source();
  const path = `v1/contributions/${encodeURIComponent(image.contribution)}`;
  const accepted = image.accepted;
  await busy(accepted ? "Taking it back…" : "Accepting…", async (signal) => {
    try {
      if (accepted) await ask(path, undefined, signal, "DELETE");
      else await ask(`${path}/accept`, {}, signal);
    } catch (error) {
      if (error.status !== 404) throw error;
      image.contribution = null;
      throw new Failure(accepted ? "It is not kept any more." : "It is too late to accept this edit: the server has forgotten it.");
    }
    image.accepted = !accepted;
    if (accepted) image.contribution = null; // what was taken back is gone
    say(accepted ? "Taken back: nothing of this edit is kept." : "Accepted: this edit is kept for training.");
  });
  // Meanwhile it was hidden, and what is hidden has no focus.
  if (document.activeElement === document.body) $($("accept").hidden ? "redo" : "accept").focus();
}

// ---------------------------------------------------------------------------------- images, history

/** A blob as an image that can be shown, its size as it is when upright. */
async function opened(blob, otherwise) {
  try {
    const bitmap = await createImageBitmap(blob);
    const { width, height } = bitmap;
    bitmap.close();
    return { blob, url: URL.createObjectURL(blob), width, height };
  } catch {
    throw new Failure(otherwise);
  }
}

async function open(file) {
  if (!file) return;
  if (state.work) return tell(new Failure("Wait until this is done, or cancel it first."));
  tell(null);
  try {
    const image = await opened(file, "This file is not an image that a browser can show.");
    const step = { kind: "opened", from: null, prompt: file.name || "pasted image", images: [image], chosen: 0 };
    state.steps.push(step);
    setMode("edit");
    setBlueprint("", null);
    select(step);
    say("The image is open.");
    $("prompt").focus();
  } catch (error) {
    tell(error);
  }
}

/** The step that is shown: what was opened or edited is not what "Create" is about. */
const shownStep = () => (state.mode === "create" && state.at?.kind !== "created" ? null : state.at);

/** The image that the next edit starts from. */
const source = () => state.at && state.at.images[state.at.chosen];

function select(step) {
  state.at = step;
  clearMask();
  setMarking(false);
  $("split").value = 50;
  render();
}

/** Go to a step of the history, with the words that it was made of. */
function goTo(step) {
  if (state.work) return;
  tell(null);
  setMode(step.kind === "created" ? "create" : "edit");
  select(step);
  setBlueprint(blueprintOf(step) ?? "", step.prompt);
  say(`${nameOf(step)}. The next edit starts from this image.`);
}

/** Back to where a step started, its words and mask in the form, to be changed and painted again. */
function redo() {
  const step = state.at;
  if (state.work || !step || step.kind === "opened") return;
  if (step.kind === "edited") {
    state.at = step.from;
    step.from.chosen = Math.max(0, step.from.images.indexOf(step.fromImage));
    select(step.from);
    restoreMask(step.mask);
  }
  $("prompt").value = step.prompt;
  setBlueprint(step.blueprint ?? "", step.prompt);
  render();
  say("Change what you like, then paint again.");
  $("prompt").focus();
}

function nameOf(step) {
  const number = state.steps.indexOf(step) + 1;
  const from = step.from ? `, from ${state.steps.indexOf(step.from) + 1}` : "";
  return `${number}: ${shortened(step.prompt, 80)}${from}`;
}

function renderHistory() {
  const list = document.querySelector("#history ol");
  const focused = [...list.querySelectorAll("button")].indexOf(document.activeElement);
  list.replaceChildren(
    ...state.steps.map((step) => {
      const button = element("button", { type: "button", className: "thumb" });
      button.append(
        element("img", { src: step.images[step.chosen].url, alt: "" }),
        element("span", {}, nameOf(step)),
      );
      if (step === state.at) button.setAttribute("aria-current", "true");
      button.addEventListener("click", () => goTo(step));
      const item = element("li");
      item.append(button);
      return item;
    }),
  );
  if (focused >= 0) list.querySelectorAll("button")[focused]?.focus();
  $("history").hidden = !state.steps.length;
}

function renderGallery() {
  const images = shownStep()?.images ?? [];
  $("gallery").hidden = images.length < 2 && !images[0]?.review;
  const choices = images.map((image, index) => {
    const label = element("label", { className: image.review ? "thumb looked-at" : "thumb" });
    const radio = element("input", { type: "radio", name: "result", checked: index === state.at.chosen });
    radio.addEventListener("change", () => {
      state.at.chosen = index;
      if (image.review) setBlueprint(blueprintOf(state.at), state.at.prompt);
      clearMask();
      renderStage();
      renderHistory();
    });
    const seed = image.seed === undefined ? "" : `, seed ${image.seed}`;
    const said = image.review ? verdictOf(image.review) : `${index + 1}${seed}`;
    const missing = sentence(image.review?.missing || image.review?.error);
    label.append(radio, element("img", { src: image.url, alt: "" }));
    label.append(element("span", {}, missing ? `${said}. ` : said));
    if (missing) label.append(element("span", { className: "missing" }, missing));
    return label;
  });
  $("gallery").querySelector(".strip").replaceChildren(...choices);
}

// ------------------------------------------------------------------------------------------ the stage

let preview = null;

function showPreview(image) {
  if (preview) URL.revokeObjectURL(preview.url);
  preview = image;
  renderStage();
}

function renderStage() {
  const image = source();
  const earlier = state.at?.fromImage;
  const shown = shownStep() && image;
  let view = shown ? "image" : "empty";
  if (shown && earlier && !state.marking && !maskIsDrawn()) view = "compare";
  if (state.work) view = shown || preview ? "painting" : "empty";
  $("stage").dataset.view = view;
  const back = view === "compare" ? earlier : (shown ?? preview);
  const front = view === "compare" ? image : view === "painting" ? preview : null;
  setImage($("before"), back, view === "compare" ? "Before" : altOf(state.at));
  setImage($("after"), front, view === "compare" ? `After: ${state.at.prompt}` : "Preview of the result");
  const size = front ?? back;
  if (size) {
    $("figure").style.setProperty("--ratio", size.width / size.height);
    $("figure").classList.toggle("small", Math.max(size.width, size.height) <= SMALL);
  }
  renderSplit();
  const result = state.at && state.at.kind !== "opened";
  $("stage-tools").hidden = !shown || Boolean(state.work);
  document.querySelector(".for-result").hidden = !result;
  $("accept").hidden = !shown?.contribution;
  $("accept").textContent = shown?.accepted ? "Take back from training" : "Accept for training";
  $("download").href = shown?.url ?? "";
  $("download").download = shown ? fileName(`draw-in-mind-${state.steps.indexOf(state.at) + 1}`, shown.blob) : "";
}

const altOf = (step) => (step?.kind === "opened" ? "The image to edit" : (step?.prompt ?? ""));

function setImage(place, image, alt) {
  place.hidden = !image;
  place.alt = image ? alt : "";
  if (image) place.src = image.url;
  else place.removeAttribute("src");
}

function renderSplit() {
  const before = Number($("split").value);
  $("figure").style.setProperty("--split", `${before}%`);
  $("split").setAttribute("aria-valuetext", `${before} % before, ${100 - before} % after`);
}

function render() {
  document.body.dataset.mode = state.mode;
  const working = Boolean(state.work);
  for (const id of ["paint", "plan"]) $(id).setAttribute("aria-disabled", String(working));
  if (!working && document.activeElement === $("cancel")) $("paint").focus();
  $("cancel").hidden = !working;
  $("progress").hidden = !working;
  $("modes").disabled = working;
  $("sections").setAttribute("aria-busy", String(working));
  for (const [name] of SECTIONS) sectionField(name).readOnly = working;
  $("plan").hidden = $("designer").value === "none";
  $("n").disabled = reviewed();
  const create = state.mode === "create";
  $("prompt").placeholder = create ? "A cup on a wooden table" : "Remove the cup from the table";
  $("prompt-label").textContent = create ? "What should the image show?" : "What should change?";
  renderStage();
  renderGallery();
  renderHistory();
  renderBlueprint();
}

function setMode(mode) {
  state.mode = mode;
  document.querySelector(`#modes input[value="${mode}"]`).checked = true;
  if (mode === "create") setMarking(false);
  render();
}

// ------------------------------------------------------------------------------------------- the mask

const canvas = $("mask");
const pen = canvas.getContext("2d", { willReadFrequently: true });
const brush = { x: 0.5, y: 0.5, last: null };

function clearMask() {
  const image = source();
  const scale = image ? Math.min(1, MASK_SIDE / Math.max(image.width, image.height)) : 1;
  canvas.width = Math.max(1, Math.round((image?.width ?? 1) * scale));
  canvas.height = Math.max(1, Math.round((image?.height ?? 1) * scale));
  canvas.dataset.drawn = "";
}

const maskIsDrawn = () => Boolean(canvas.dataset.drawn);

/** Draw from one place of the image (0 to 1) to another with the brush, or the eraser. */
function stroke(from, to) {
  const erase = document.querySelector('input[name="tool"]:checked').value === "erase";
  pen.globalCompositeOperation = erase ? "destination-out" : "source-over";
  pen.strokeStyle = maskColour();
  pen.lineCap = pen.lineJoin = "round";
  pen.lineWidth = brushPixels();
  pen.beginPath();
  pen.moveTo(from.x * canvas.width, from.y * canvas.height);
  pen.lineTo(to.x * canvas.width, to.y * canvas.height + 0.01); // a dot is a line too
  pen.stroke();
  noteMask();
}

const brushPixels = () => (Number($("brush").value) / 100) * Math.max(canvas.width, canvas.height);
const maskColour = () => getComputedStyle(canvas).getPropertyValue("--mask").trim() || "#f55";

function noteMask() {
  canvas.dataset.drawn = markedShare() > 0 ? "yes" : "";
}

/** Which share of the image is marked, of a sample of its pixels. */
function markedShare() {
  const small = new OffscreenCanvas(96, 96);
  const context = small.getContext("2d");
  context.drawImage(canvas, 0, 0, 96, 96);
  const { data } = context.getImageData(0, 0, 96, 96);
  let marked = 0;
  for (let index = 3; index < data.length; index += 4) marked += data[index] > 0 ? 1 : 0;
  return marked / (96 * 96);
}

const sayMarked = later(() => {
  const share = Math.round(markedShare() * 100);
  say(maskIsDrawn() ? `${Math.max(1, share)} % of the image is marked.` : "Nothing is marked.");
}, 250);

/** The mask as OpenAI's API has it: a PNG of the image's size, transparent where it may change. */
async function maskFile() {
  if (!maskIsDrawn()) return null;
  const { width, height } = source();
  const whole = new OffscreenCanvas(width, height);
  const context = whole.getContext("2d");
  context.drawImage(canvas, 0, 0, width, height);
  const pixels = context.getImageData(0, 0, width, height);
  for (let index = 0; index < pixels.data.length; index += 4) {
    const kept = pixels.data[index + 3] < 128 ? 255 : 0;
    pixels.data.set([0, 0, 0, kept], index);
  }
  context.putImageData(pixels, 0, 0);
  return whole.convertToBlob({ type: "image/png" });
}

function keptMask() {
  if (!maskIsDrawn()) return null;
  const kept = new OffscreenCanvas(canvas.width, canvas.height);
  kept.getContext("2d").drawImage(canvas, 0, 0);
  return kept;
}

function restoreMask(kept) {
  if (!kept) return;
  pen.globalCompositeOperation = "source-over";
  pen.drawImage(kept, 0, 0);
  noteMask();
}

function setMarking(on) {
  state.marking = on;
  $("mark").setAttribute("aria-pressed", String(on));
  $("mask-tools").hidden = !on;
  $("figure").classList.toggle("marking", on);
  canvas.tabIndex = on ? 0 : -1;
  if (on) moveCursor();
}

function moveCursor() {
  const cursor = $("cursor").style;
  const box = canvas.getBoundingClientRect();
  const size = (brushPixels() / canvas.width) * box.width;
  cursor.setProperty("--x", `${brush.x * 100}%`);
  cursor.setProperty("--y", `${brush.y * 100}%`);
  cursor.setProperty("--size", `${size}px`);
}

function placeOf(event) {
  const box = canvas.getBoundingClientRect();
  return { x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height };
}

function drawWithPointer(event) {
  Object.assign(brush, placeOf(event));
  moveCursor();
  if (!brush.last) return;
  stroke(brush.last, brush);
  brush.last = placeOf(event);
  sayMarked();
}

function drawWithKey(event) {
  const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const from = { x: brush.x, y: brush.y };
  if (arrows[event.key]) {
    const pixels = brushPixels() / 2;
    const [right, down] = arrows[event.key];
    brush.x = between(0, brush.x + (right * pixels) / canvas.width, 1);
    brush.y = between(0, brush.y + (down * pixels) / canvas.height, 1);
    if (event.shiftKey) stroke(from, brush);
    else say(`Brush at ${Math.round(brush.x * 100)} %, ${Math.round(brush.y * 100)} %.`);
  } else if (event.key === " " || event.key === "Enter") stroke(from, from);
  else if (event.key === "[") $("brush").stepDown(2);
  else if (event.key === "]") $("brush").stepUp(2);
  else return;
  event.preventDefault();
  moveCursor();
  if (event.shiftKey || event.key === " " || event.key === "Enter") sayMarked();
}

const between = (low, value, high) => Math.min(high, Math.max(low, value));

function wireMask() {
  $("mark").addEventListener("click", () => {
    setMarking(!state.marking);
    renderStage();
    if (state.marking) canvas.focus({ preventScroll: true });
  });
  canvas.addEventListener("pointerdown", (event) => {
    if (!state.marking || event.button !== 0) return;
    canvas.setPointerCapture(event.pointerId);
    brush.last = placeOf(event);
    drawWithPointer(event);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!state.marking) return;
    for (const each of event.getCoalescedEvents?.() ?? [event]) drawWithPointer(each);
  });
  for (const end of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(end, () => (brush.last = null));
  }
  canvas.addEventListener("keydown", (event) => state.marking && drawWithKey(event));
  $("brush").addEventListener("input", moveCursor);
  $("mask-clear").addEventListener("click", () => {
    clearMask();
    renderStage();
    sayMarked();
  });
  $("mask-all").addEventListener("click", () => {
    pen.globalCompositeOperation = "source-over";
    pen.fillStyle = maskColour();
    pen.fillRect(0, 0, canvas.width, canvas.height);
    noteMask();
    sayMarked();
  });
}

// ---------------------------------------------------------------------------------------- as code

const server = () => new URL(".", location.href).href.replace(/\/$/, "");

/** The request that made the image that is shown, its seed the one that was used. */
function requestOf(step) {
  const { prompt, consent, ...fields } = step.fields; // who runs the copy has not consented
  const seed = fields.seed ?? step.images[0].seed;
  return { prompt, ...(step.blueprint && { blueprint: step.blueprint }), ...fields, ...(seed !== undefined && { seed }) };
}

const inShell = (text) => `'${String(text).replaceAll("'", `'\\''`)}'`;
const inPython = (value) => JSON.stringify(value); // of texts and numbers: what Python reads too

function asCurl(step) {
  const fields = requestOf(step);
  const lines = [`curl ${server()}/v1/images/${step.kind === "edited" ? "edits" : "generations"}`];
  if (state.key) lines.push('-H "Authorization: Bearer $DIM_API_KEY"');
  if (step.kind === "edited") {
    lines.push(`-F image=@${fileName("image", step.fromImage.blob)}`);
    if (step.mask) lines.push("-F mask=@mask.png");
    // --form-string, because -F would read a file where a text begins with @ or <
    for (const [name, value] of Object.entries(fields)) {
      lines.push(`--form-string ${inShell(`${name}=${value}`)}`);
    }
  } else {
    lines.push("-H 'Content-Type: application/json'", `-d ${inShell(JSON.stringify(fields))}`);
  }
  return lines.join(" \\\n  ");
}

function asPython(step) {
  const { prompt, n, size, ...extra } = requestOf(step);
  const edited = step.kind === "edited";
  const given = edited ? [`image=open(${inPython(fileName("image", step.fromImage.blob))}, "rb")`] : [];
  if (step.mask) given.push('mask=open("mask.png", "rb")');
  given.push(`prompt=${inPython(prompt)}`);
  if (!edited) given.push(`model=${inPython($("model").textContent || "dim")}`);
  if (n) given.push(`n=${n}`);
  if (size) given.push(`size=${inPython(size)}`);
  const own = Object.entries(extra).map(([name, value]) => `${inPython(name)}: ${inPython(value)}`);
  if (own.length) given.push(`extra_body={${own.join(", ")}}`);
  return [
    "import base64",
    "import os",
    "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${inPython(`${server()}/v1`)}, api_key=os.environ.get("DIM_API_KEY", "none"))`,
    `answer = client.images.${edited ? "edit" : "generate"}(`,
    ...given.map((line) => `    ${line},`),
    ")",
    'with open("painted.png", "wb") as file:',
    "    file.write(base64.b64decode(answer.data[0].b64_json))",
    "",
  ].join("\n");
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    say("Copied.");
  } catch {
    // Without HTTPS, or without leave, a browser gives no clipboard: then it can be copied by hand.
    $("code-text").value = text;
    $("code").showModal();
    $("code-text").select();
  }
}

// --------------------------------------------------------------------------------------- the API key

function remembered() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

let afterKey = null;

function askForKey(again) {
  afterKey = again;
  $("key-form").hidden = false;
  $("key").focus();
}

function useKey(event) {
  event.preventDefault();
  state.key = $("key").value.trim();
  try {
    sessionStorage.setItem(KEY, state.key);
  } catch {
    // Storage is switched off here: the key is known until the page is left.
  }
  $("key").value = "";
  $("key-form").hidden = true;
  tell(null);
  const again = afterKey;
  $("prompt").focus();
  again?.();
}

// ------------------------------------------------------------------------------------------- telling

function say(text) {
  $("status").textContent = text;
}

/** Show a failure as one sentence; `null` takes it away. A missing key is asked for. */
function tell(error, again = null) {
  if (!error) {
    $("error").textContent = "";
    return;
  }
  if (!(error instanceof Failure)) console.error(error);
  $("error").textContent = error instanceof Failure ? error.message : "Something went wrong on this page.";
  if (error.status === 401) askForKey(again);
}

// ------------------------------------------------------------------------------------------ small things

function element(name, properties = {}, text = "") {
  const made = Object.assign(document.createElement(name), properties);
  if (text) made.textContent = text;
  return made;
}

function shortened(text, length) {
  return text.length > length ? `${text.slice(0, length - 1)}…` : text;
}

/** `work`, once nobody has asked for it for some milliseconds. */
function later(work, wait) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(work, wait);
  };
}

/** As high as its text; where the browser does that by itself, nothing is done. */
function fit(field) {
  if (CSS.supports("field-sizing", "content")) return;
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}

// ---------------------------------------------------------------------------------------------- start

/** The model's name and its designers, as far as the server tells. */
async function learn() {
  try {
    const models = await (await ask("v1/models")).json();
    const model = models.data?.[0] ?? {};
    $("model").textContent = model.id ?? "";
    offerToLearn(model.contributions ?? "never");
    if (Array.isArray(model.designers)) offer(model.designers);
  } catch (error) {
    if (error.status === 401) return tell(error, learn);
  }
  if ($("designer").options.length) return;
  const health = await fetch("healthz").then((answer) => answer.json()).catch(() => ({}));
  $("model").textContent ||= health.model ?? "";
  if (Array.isArray(health.designers)) offer(health.designers);
}

/** Ask whether edits may be kept for training, where the server keeps any. */
function offerToLearn(contributions) {
  state.contributions = contributions;
  $("consent-field").hidden = contributions === "never";
  $("consent").checked = contributions === "always";
}

function offer(designers) {
  const options = designers.map((name) =>
    element("option", { value: name }, name === "none" ? "none: paint the instruction itself" : String(name)),
  );
  $("designer").replaceChildren(...options);
  $("designer-field").hidden = !options.length;
  render();
}

function fileOf(transfer) {
  return [...(transfer?.files ?? [])].find((file) => file.type.startsWith("image/")) ?? transfer?.files?.[0];
}

function wireFiles() {
  $("file").addEventListener("change", () => {
    open($("file").files[0]);
    $("file").value = "";
  });
  document.addEventListener("paste", (event) => {
    const file = fileOf(event.clipboardData);
    if (!file) return;
    event.preventDefault();
    open(file);
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("dragging");
  });
  for (const end of ["dragleave", "drop", "dragend"]) {
    document.addEventListener(end, (event) => {
      if (end !== "dragleave" || !event.relatedTarget) document.body.classList.remove("dragging");
    });
  }
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    open(fileOf(event.dataTransfer));
  });
}

function wireForm() {
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    paint();
  });
  $("plan").addEventListener("click", writeBlueprint);
  $("cancel").addEventListener("click", () => state.work?.abort());
  $("prompt").addEventListener("input", renderBlueprint);
  for (const id of ["designer", "rounds", "best_of"]) $(id).addEventListener("input", render);
  $("keep").addEventListener("click", () => {
    state.plannedFor = $("prompt").value.trim();
    renderBlueprint();
    $("prompt").focus();
  });
  $("discard").addEventListener("click", () => {
    setBlueprint("", null);
    $("by-hand").focus();
  });
  $("by-hand").addEventListener("click", () => {
    $("sections").hidden = false;
    renderBlueprint();
    sectionField("instruction").focus();
  });
  $("key-form").addEventListener("submit", useKey);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && state.work) state.work.abort();
    const inForm = $("form").contains(event.target);
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && inForm) {
      event.preventDefault();
      paint();
    }
  });
}

function wireStage() {
  $("split").addEventListener("input", renderSplit);
  $("redo").addEventListener("click", redo);
  $("edit-this").addEventListener("click", () => {
    setMode("edit");
    setBlueprint("", null);
    $("prompt").value = "";
    $("prompt").focus();
  });
  $("copy-curl").addEventListener("click", () => copy(asCurl(state.at)));
  $("accept").addEventListener("click", acceptOrTakeBack);
  $("copy-python").addEventListener("click", () => copy(asPython(state.at)));
  $("code-close").addEventListener("click", () => $("code").close());
  for (const radio of document.querySelectorAll('#modes input')) {
    radio.addEventListener("change", () => setMode(radio.value));
  }
  addEventListener("resize", moveCursor);
}

buildSections();
wireFiles();
wireForm();
wireStage();
wireMask();
render();
learn();
