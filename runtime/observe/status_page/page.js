// The status page: asks five times a second, shows the answer, and can stop the robot.
//
// The token lives in this tab's memory and travels only in an Authorization header. A link may
// carry it as #token=..., which browsers do not send to servers; it is taken out of the address.
"use strict";

const PERIOD_MS = 200;
const MINUTE_MS = 60000;
const SILENT_S = 1.0; // ticks come 30 times a second
const OLD_IMAGE_S = 1.0;
const byId = (id) => document.getElementById(id);
const ages = []; // [time, seconds or null], of the last minute
const shown = new Map(); // camera -> {image, caption, stamp, url}
let token = "";

function takeTokenFromAddress() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) {
    token = given;
    byId("token").value = given;
    history.replaceState(null, "", location.pathname);
  }
}

async function ask(path, options = {}) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const signal = AbortSignal.timeout(5000);
  const answer = await fetch(path, { ...options, headers, signal, credentials: "omit" });
  if (!answer.ok) {
    const told = await answer.json().catch(() => ({}));
    const error = new Error(told.error || `${answer.status} ${answer.statusText}`);
    error.status = answer.status;
    throw error;
  }
  return answer;
}

const number = (value, digits) => (value === null ? "\u2013" : value.toFixed(digits));

function put(id, text, off = false) {
  const element = byId(id);
  element.textContent = text;
  const value = element.closest(".value");
  if (value) value.classList.toggle("off", off);
}

function stateOf(status) {
  if (!status.started) return ["starting", "wait"];
  if (status.state === "stop") return [status.finished ? "stopped" : "stop", "stop"];
  if (status.finished) return ["ended", ""];
  if (status.silent_s > SILENT_S) return ["silent", "silent"];
  return [status.state, status.state];
}

function show(status) {
  const [word, kind] = stateOf(status);
  const badge = byId("state");
  badge.textContent = word;
  badge.className = `badge ${kind}`;
  document.title = `${word} \u00b7 ${status.robot} \u00b7 OpenHelix`;
  put("robot", `${status.robot} (${status.driver}), ${status.run}`);
  put("task-line", `Instruction ${status.number}${status.task ? `: ${status.task}` : ""}`);
  put("instruction", status.instruction || "\u2013");
  put("reason", status.reason);
  put("understood", status.understood === null ? "\u2013" : Math.round(100 * status.understood).toString(),
    status.reason === "not understood");
  const limit = status.latent_max_age_s;
  put("age", number(status.latent_age_s, 2), status.latent_age_s !== null && status.latent_age_s > limit);
  put("age-limit", limit.toFixed(1));
  const rates = status.rates_hz, want = status.expected_hz;
  put("hz-system2", number(rates.system2, 2));
  put("hz-system1", number(rates.system1, 2));
  put("hz-loop", number(rates.loop, 1), status.started && rates.loop < 0.9 * want.loop);
  put("want-system2", String(want.system2));
  put("want-loop", String(want.loop));
  put("succeeded", String(status.succeeded));
  put("attempted", String(status.attempted));
  put("steps", String(status.steps));
  put("steps-limit", String(status.steps_limit));
  put("silent", status.started ? number(status.silent_s, 1) : "\u2013", status.silent_s > SILENT_S);
  put("ticks", String(status.ticks));
  showStops(status.stops);
  drawAges(status.latent_age_s, limit);
}

function showStops(stops) {
  const rows = stops.map((stop) => {
    const row = document.createElement("li");
    row.textContent = `${stop.reason}, ${stop.ago_s.toFixed(0)} s ago`;
    return row;
  });
  if (!rows.length) {
    const none = document.createElement("li");
    none.className = "none";
    none.textContent = "none";
    rows.push(none);
  }
  byId("stops").replaceChildren(...rows.reverse());
}

function drawAges(age, limit) {
  const now = performance.now();
  ages.push([now, age]);
  while (ages.length && now - ages[0][0] > MINUTE_MS) ages.shift();
  const canvas = byId("ages"), pen = canvas.getContext("2d");
  const { width, height } = canvas, style = getComputedStyle(document.documentElement);
  const top = 1.15 * Math.max(limit, ...ages.map(([, value]) => value || 0));
  const y = (value) => height - 4 - (height - 8) * (value / top);
  pen.clearRect(0, 0, width, height);
  pen.lineWidth = 1.5;
  pen.strokeStyle = style.getPropertyValue("--bad");
  pen.setLineDash([6, 6]);
  pen.beginPath();
  pen.moveTo(0, y(limit));
  pen.lineTo(width, y(limit));
  pen.stroke();
  pen.setLineDash([]);
  pen.lineWidth = 2;
  pen.strokeStyle = style.getPropertyValue("--accent");
  pen.beginPath();
  let down = false;
  for (const [at, value] of ages) {
    const x = width * (1 - (now - at) / MINUTE_MS);
    if (value !== null) pen[down ? "lineTo" : "moveTo"](x, y(value));
    down = value !== null;
  }
  pen.stroke();
}

function cameraFigure(name) {
  const figure = document.createElement("figure");
  const image = document.createElement("img");
  image.alt = `what the camera ${name} sees`;
  const caption = document.createElement("figcaption");
  const label = document.createElement("span"), age = document.createElement("span");
  label.textContent = name;
  caption.append(label, age);
  figure.append(image, caption);
  byId("cameras").append(figure);
  return { image, age, stamp: null, url: null };
}

async function showCameras(cameras) {
  for (const [name, { t_ns: stamp, age_s: age }] of Object.entries(cameras)) {
    if (!shown.has(name)) shown.set(name, cameraFigure(name));
    const view = shown.get(name);
    view.age.textContent = age > OLD_IMAGE_S ? `${age.toFixed(1)} s old` : `${Math.round(age * 1000)} ms old`;
    view.age.classList.toggle("old", age > OLD_IMAGE_S);
    if (view.stamp === stamp) continue;
    const answer = await ask(`/api/camera/${encodeURIComponent(name)}`);
    const url = URL.createObjectURL(await answer.blob());
    view.image.src = url;
    if (view.url) URL.revokeObjectURL(view.url);
    view.stamp = stamp;
    view.url = url;
  }
}

function trouble(text) {
  byId("trouble").textContent = text;
  byId("trouble").hidden = !text;
  byId("main").classList.toggle("old", Boolean(text));
  if (text) {
    byId("state").textContent = "no news";
    byId("state").className = "badge silent";
  }
}

async function refresh() {
  try {
    const status = await (await ask("/api/status")).json();
    byId("main").hidden = false;
    byId("login").hidden = true;
    trouble("");
    show(status);
    await showCameras(status.cameras);
  } catch (error) {
    byId("login").hidden = error.status !== 401;
    trouble(error.status ? error.message : `the status page's server does not answer (${error.message})`);
  } finally {
    setTimeout(refresh, PERIOD_MS);
  }
}

async function stopRobot(event) {
  event.preventDefault();
  token = byId("token").value.trim();
  const told = byId("stop-told"), button = byId("stop-button");
  button.disabled = true;
  told.textContent = "asking the robot to stop\u2026";
  try {
    await ask("/api/stop", { method: "POST" });
    told.textContent = "the robot was told to stop";
  } catch (error) {
    told.textContent = `NOT stopped: ${error.message}`;
  } finally {
    button.disabled = false;
  }
}

byId("stop").addEventListener("submit", stopRobot);
byId("login").addEventListener("submit", (event) => {
  event.preventDefault();
  token = byId("login-token").value.trim();
  byId("token").value = token;
});
takeTokenFromAddress();
refresh();
