// Sends frames of the camera, or of a file, to live.py at the model's rate; shows the labels that come back. Where live.py
// reads a camera itself, its frames come with the labels.
"use strict";

const $ = (id) => document.getElementById(id);
const video = $("video"), canvas = document.createElement("canvas");
const MAX_WIDTH = 1920;  // px; a larger picture is reduced before it is sent
const QUALITY = 0.92;    // of the JPEGs
const MINUTE = 60;       // s of history
const NOT_SURE = "not sure";  // as live.py says where the best class is below the threshold

let info = null;         // of the model and the machine's camera, as live.py has them
let socket = null;
let source = null;       // "camera", "file", "machine" (its own camera) or null
let slot = null;         // number of the last sampled frame since time 0, at the model's rate
let capturing = false;
let labelled = false;    // whether this source has had a label
let sent = new Map();    // time of a frame in s -> when it was captured, in ms of performance.now()
let labels = [];         // {when: ms, label} of the last minute
const colours = new Map();

function say(text) {
  $("message").textContent = text;
  $("message").hidden = !text;
}

// --- connection ---------------------------------------------------------------------------------------------------

function connect() {
  socket = new WebSocket(new URL("frames", location.href.replace(/^http/, "ws")));
  socket.binaryType = "arraybuffer";
  socket.onmessage = (event) => typeof event.data === "string" ? receive(JSON.parse(event.data)) : showPicture(event.data);
  socket.onclose = () => {
    stop();
    for (const id of ["camera", "choose", "record"]) $(id).disabled = true;
    say("live.py has ended. Start it again and open the address that it prints.");
  };
}

function receive(message) {
  if (message.error) say(message.error);
  if (message.camera_trouble !== undefined) say(message.camera_trouble);
  if (message.filled !== undefined) showFilling(message.filled);
  if (message.five) showLabel(message);
  if (message.recording !== undefined) showRecording(true, `Recording to ${message.recording}`);
  if (message.recorded !== undefined) showRecording(false, message.recorded ? `Recorded ${message.recorded}` : "");
}

// --- sources ------------------------------------------------------------------------------------------------------

const CAMERA_TROUBLE = {
  NotAllowedError: "The camera was refused. Allow it in the browser, beside the address, and press Start camera again.",
  SecurityError: "The camera was refused by the browser's settings. Allow it there and press Start camera again.",
  NotFoundError: "No camera was found. Connect one, or drop a video file here.",
  NotReadableError: "The camera is in use by another program, or broken. Close that program and press Start camera again.",
  AbortError: "The camera did not start. Press Start camera again.",
  OverconstrainedError: "This camera cannot be used. Choose another one.",
};

async function startCamera() {
  stop();
  say("");
  $("camera").disabled = true;
  if (!navigator.mediaDevices) {
    $("camera").disabled = false;
    say("The browser gives a camera to pages of its own machine only: open the page there, through ssh -L, or start live.py with --camera.");
    return;
  }
  const wanted = { width: { ideal: 640 }, height: { ideal: 480 }, frameRate: { ideal: 30 } };
  if ($("cameras").value) wanted.deviceId = { exact: $("cameras").value };
  try {
    const stream = await navigator.mediaDevices.getUserMedia({ video: wanted, audio: false });
    stream.getVideoTracks()[0].onended = () => {
      if (video.srcObject !== stream) return;
      stop();
      say("The camera has gone. Connect it and press Start camera again.");
    };
    video.srcObject = stream;
    await begin("camera");
    await listCameras(stream);
  } catch (error) {
    stop();
    say(CAMERA_TROUBLE[error.name] || `The camera cannot be used: ${error.message}.`);
  }
}

async function listCameras(stream) {
  const cameras = (await navigator.mediaDevices.enumerateDevices()).filter((device) => device.kind === "videoinput");
  const current = stream.getVideoTracks()[0].getSettings().deviceId;
  $("cameras").replaceChildren(...cameras.map((device, i) => {
    const option = new Option(device.label || `camera ${i + 1}`, device.deviceId);
    option.selected = device.deviceId === current;
    return option;
  }));
  $("cameras-label").hidden = cameras.length < 2;
}

async function playFile(file) {
  stop();
  say("");
  video.src = URL.createObjectURL(file);
  video.controls = true;
  try {
    video.onended = () => endOfFile(file);
    await begin("file");
  } catch {
    stop();
    say(`This browser cannot play ${file.name}. python tools/predict.py classifies it all the same.`);
  }
}

// a file shorter than a clip has had no label: live.py reads it as predict.py does, which samples it faster
async function endOfFile(file) {
  $("state").textContent = "The file has ended.";
  if (labelled) return;
  const response = await fetch("file", { method: "POST", body: file });
  const answer = response.ok ? await response.json() : { error: await response.text() };  // it is too large
  if (source !== "file") return;
  if (answer.error) say(answer.error);
  else showLabel(answer);
}

// the machine's own camera: live.py reads it
function showPicture(data) {
  const seconds = new DataView(data).getFloat64(0);
  remember(seconds);
  URL.revokeObjectURL($("picture").src);
  $("picture").src = URL.createObjectURL(new Blob([data.slice(8)], { type: "image/jpeg" }));
  if (source === "machine") return;
  source = "machine";
  $("picture").hidden = false;
  $("source").classList.add("playing");
  $("record").disabled = false;
}

async function begin(kind) {
  source = kind;
  slot = null;
  labelled = false;
  sent.clear();
  await video.play();
  $("source").classList.add("playing");
  $("stop").disabled = $("record").disabled = false;
  $("camera").disabled = kind === "camera";
  waitForFrame();
}

function stop() {
  if ($("record").getAttribute("aria-pressed") === "true") send(JSON.stringify({ record: false }));
  source = null;
  if (video.srcObject) for (const track of video.srcObject.getTracks()) track.stop();
  if (video.src) URL.revokeObjectURL(video.src);
  video.srcObject = null;
  video.removeAttribute("src");
  video.controls = false;
  video.load();
  $("source").classList.remove("playing");
  $("stop").disabled = $("record").disabled = true;
  $("camera").disabled = false;
  $("state").textContent = "Stopped.";
}

// --- sampling: the first frame of each 1 / frame_rate s ------------------------------------------------------------

function waitForFrame() {
  if (!source) return;
  if (video.requestVideoFrameCallback) {
    video.requestVideoFrameCallback((now, frame) => { sample(frame.mediaTime); waitForFrame(); });
  } else {
    setTimeout(() => { sample(video.currentTime); waitForFrame(); }, 250 / info.frame_rate);
  }
}

function sample(seconds) {
  const next = Math.floor(seconds * info.frame_rate + 1e-6);
  if (!source || next === slot || capturing || !video.videoWidth) return;
  slot = next;
  const scale = Math.min(1, MAX_WIDTH / video.videoWidth);
  canvas.width = Math.round(video.videoWidth * scale);
  canvas.height = Math.round(video.videoHeight * scale);
  canvas.getContext("2d", { alpha: false }).drawImage(video, 0, 0, canvas.width, canvas.height);
  const captured = performance.now();
  capturing = true;
  canvas.toBlob(async (blob) => {
    capturing = false;
    const message = new Uint8Array(8 + blob.size);
    new DataView(message.buffer).setFloat64(0, seconds);
    message.set(new Uint8Array(await blob.arrayBuffer()), 8);
    remember(seconds, captured);
    send(message);
  }, "image/jpeg", QUALITY);
}

function remember(seconds, when = performance.now()) {
  sent.set(seconds, when);
  if (sent.size > 100) sent.delete(sent.keys().next().value);
}

function send(message) {
  if (socket && socket.readyState === WebSocket.OPEN && socket.bufferedAmount < 4e6) socket.send(message);
}

// --- what is shown ------------------------------------------------------------------------------------------------

function element(tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function showFilling(frames) {
  if (source) $("state").textContent = `Collecting frames: ${frames} of ${info.clip_len}.`;
}

function showLabel({ time, label, five, network_ms, strip }) {
  if (!source) return;
  labelled = true;
  if ($("label").textContent !== label) $("label").textContent = label;  // is read out when it changes
  const delay = sent.has(time) ? `${((performance.now() - sent.get(time)) / 1000).toFixed(1)} s behind the picture` : "Of the whole file";
  $("state").textContent = `${delay}; the network takes ${(network_ms / 1000).toFixed(2)} s.`;
  $("bars").classList.toggle("unsure", label !== five[0][0]);
  $("bars").replaceChildren(...five.map(([name, p]) => {
    const item = element("li", ""), text = element("span", "text"), track = element("span", "track");
    const bar = element("span", "bar");
    text.append(element("span", "name", name), element("span", "percent", `${(100 * p).toFixed(1)} %`));
    bar.style.width = `${100 * p}%`;
    track.append(bar);
    item.append(text, track);
    return item;
  }));
  $("strip").src = strip;
  $("strip").hidden = false;
  $("strip-hint").hidden = true;
  labels.push({ when: performance.now(), label });
  showHistory();
}

function colour(label) {
  if (label === NOT_SURE) return "unsure";
  if (!colours.has(label)) colours.set(label, `c${colours.size % 8}`);
  return colours.get(label);
}

function showHistory() {
  const now = performance.now();
  labels = labels.filter(({ when }) => now - when < MINUTE * 1000);
  const cells = Array.from({ length: MINUTE }, () => element("span", ""));
  const seconds = new Map();
  for (const { when, label } of labels) {
    const cell = cells[MINUTE - 1 - Math.floor((now - when) / 1000)];
    cell.className = colour(label);
    cell.title = label;
  }
  for (const { title } of cells) if (title) seconds.set(title, (seconds.get(title) || 0) + 1);
  $("history").replaceChildren(...cells);
  const words = [...seconds].map(([label, count]) => `${label} ${count} s`);
  $("history").setAttribute("aria-label", words.join(", ") || "No labels yet");
  $("legend").replaceChildren(...[...seconds].map(([label, count]) => {
    const item = element("li", "");
    item.append(element("span", `c ${colour(label)}`), `${label} ${count} s`);
    return item;
  }));
}

function showRecording(isOn, text) {
  $("record").setAttribute("aria-pressed", isOn);
  $("record").textContent = isOn ? "Stop recording" : "Record";
  if (text) say(text);
}

// --- start --------------------------------------------------------------------------------------------------------

$("camera").onclick = startCamera;
$("cameras").onchange = startCamera;
$("choose").onclick = () => $("file").click();
$("file").onchange = () => { if ($("file").files.length) playFile($("file").files[0]); };
$("stop").onclick = stop;
$("record").onclick = () => send(JSON.stringify({ record: $("record").getAttribute("aria-pressed") !== "true" }));
for (const type of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(type, (event) => {
    event.preventDefault();
    $("source").classList.toggle("over", type === "dragover");
    if (type === "drop" && info && !info.camera && event.dataTransfer.files.length) playFile(event.dataTransfer.files[0]);
  });
}
setInterval(showHistory, 1000);
fetch("info").then((response) => response.json()).then((answer) => {
  info = answer;
  $("model").textContent = `${info.model}: ${info.classes} classes, ${info.clip_len} frames at ${info.frame_rate} fps`;
  if (info.camera) {
    $("hint").textContent = `Waiting for ${info.camera}.`;
    for (const id of ["camera", "choose", "stop"]) $(id).hidden = true;
  }
  connect();
});
