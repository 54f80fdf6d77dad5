// The status page: asks five times a second, shows the answer, talks to the robot and can stop it.
//
// The token lives in this tab's memory and travels only in an Authorization header. A link may
// carry it as #token=..., which browsers do not send to servers; it is taken out of the address.
"use strict";

const PERIOD_MS = 200;
const MINUTE_MS = 60000;
const SILENT_S = 1.0; // ticks come 30 times a second
const OLD_IMAGE_S = 1.0;
const FLEET_MS = 2000;
const byId = (id) => document.getElementById(id);
const SVG = byId("drawing").namespaceURI; // of what is drawn over images
const ages = []; // [time, seconds or null], of the last minute
const shown = new Map(); // camera -> {image, caption, stamp, url}
let ageLimit = 0;
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
  byId("reason").classList.toggle("bad", status.state === "stop");
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
  put("succeeded", status.judged ? String(status.succeeded) : "\u2013");
  put("judged", String(status.judged));
  byId("of-judged").hidden = !status.judged;
  put("steps", String(status.steps));
  put("steps-limit", String(status.steps_limit));
  put("silent", status.started ? number(status.silent_s, 1) : "\u2013", status.silent_s > SILENT_S);
  put("ticks", String(status.ticks));
  showStops(status.stops);
  showHistory(status.entries);
  noteAge(status.latent_age_s, limit);
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

const MOODS = { said: "person", seen: "good", held: "person" };

function showHistory(entries) {
  const rows = entries.filter((entry) => entry.kind !== "begun" || !entry.said).map((entry) => {
    const row = document.createElement("li");
    const time = document.createElement("time"), text = document.createElement("span");
    const ago = entry.ago_s;
    time.textContent = ago < 60 ? `${ago.toFixed(0)} s ago` : `${(ago / 60).toFixed(0)} min ago`;
    text.textContent = entry.line;
    text.className = entry.kind !== "ended" ? MOODS[entry.kind] || ""
      : entry.success === true ? "good" : entry.success === false ? "bad" : "";
    row.append(time, text);
    return row;
  });
  if (rows.length) byId("history").replaceChildren(...rows.reverse());
}

function noteAge(age, limit) {
  const now = performance.now();
  ages.push([now, age]);
  while (ages.length && now - ages[0][0] > MINUTE_MS) ages.shift();
  ageLimit = limit;
  drawAges();
}

function drawAges() {
  if (!ages.length) return;
  const now = ages[ages.length - 1][0], limit = ageLimit;
  const canvas = byId("ages"), pen = canvas.getContext("2d");
  const style = getComputedStyle(document.documentElement), scale = window.devicePixelRatio || 1;
  const width = canvas.clientWidth, height = canvas.clientHeight;
  canvas.width = width * scale;
  canvas.height = height * scale;
  pen.scale(scale, scale);
  const left = 34, bottom = 18, right = width - 6, plot = height - bottom - 6;
  const top = 1.15 * Math.max(limit, ...ages.map(([, value]) => value || 0));
  const y = (value) => 6 + plot * (1 - value / top);
  const x = (seconds) => right - (right - left) * seconds / 60;
  pen.font = "11px system-ui, sans-serif";
  pen.fillStyle = style.getPropertyValue("--dim");
  pen.strokeStyle = style.getPropertyValue("--line");
  pen.lineWidth = 1;
  const step = [0.5, 1, 2, 5, 10, 20, 50, 100].find((size) => top / size <= 5) || 200;
  pen.textAlign = "right";
  pen.textBaseline = "middle";
  for (let value = 0; value <= top; value += step) {
    pen.fillText(`${value} s`, left - 5, y(value));
    pen.beginPath();
    pen.moveTo(left, y(value));
    pen.lineTo(right, y(value));
    pen.stroke();
  }
  pen.textBaseline = "bottom";
  for (const seconds of [60, 40, 20, 0]) {
    pen.textAlign = seconds === 60 ? "left" : seconds ? "center" : "right";
    pen.fillText(seconds ? `${seconds} s ago` : "now", x(seconds), height);
  }
  pen.strokeStyle = style.getPropertyValue("--bad");
  pen.lineWidth = 1.5;
  pen.setLineDash([6, 5]);
  pen.beginPath();
  pen.moveTo(left, y(limit));
  pen.lineTo(right, y(limit));
  pen.stroke();
  pen.setLineDash([]);
  pen.lineWidth = 2;
  pen.strokeStyle = style.getPropertyValue("--accent");
  pen.beginPath();
  let down = false;
  for (const [at, value] of ages) {
    if (value !== null) pen[down ? "lineTo" : "moveTo"](x((now - at) / 1000), y(value));
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
  const view = document.createElement("div"), plan = document.createElementNS(SVG, "svg");
  view.className = "view";
  plan.setAttribute("viewBox", "0 0 1 1");
  plan.setAttribute("preserveAspectRatio", "none");
  view.append(image, plan);
  label.textContent = name;
  caption.append(label, age);
  figure.append(view, caption);
  byId("cameras").append(figure);
  return { image, age, plan, stamp: null, url: null };
}

function drawPlan(plan, parts) {
  const lines = parts.map((points, i) => {
    const line = document.createElementNS(SVG, "polyline");
    line.setAttribute("points", points.map(([u, v]) => `${u},${v}`).join(" "));
    line.setAttribute("class", i === 0 ? "committed" : "ahead");
    return line;
  });
  plan.replaceChildren(...lines.reverse()); // what will be executed lies on top
}

async function showCameras(cameras) {
  for (const [name, { t_ns: stamp, age_s: age, plan }] of Object.entries(cameras)) {
    if (!shown.has(name)) shown.set(name, cameraFigure(name));
    const view = shown.get(name);
    drawPlan(view.plan, plan || []);
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

async function say(text) {
  token = byId("token").value.trim() || token;
  const told = byId("told");
  told.classList.remove("bad");
  told.textContent = "saying it\u2026";
  try {
    const body = JSON.stringify({ text });
    const answer = await (await ask("/api/say", { method: "POST", body })).json();
    const by = answer.replaces_who ? `, which ${answer.replaces_who} said` : "";
    told.textContent = answer.replaces ? `heard, instead of \u201c${answer.replaces}\u201d${by}` : "heard";
    if (!answer.word) byId("text").value = "";
  } catch (error) {
    told.classList.add("bad");
    told.textContent = `not heard: ${error.message}`;
  }
}

function cell(text) {
  const td = document.createElement("td");
  td.textContent = text;
  return td;
}

function fleetRow(name, run, served) {
  const row = document.createElement("tr");
  const age = run && run.latent_age_s !== null && run.latent_age_s !== undefined ? `${run.latent_age_s.toFixed(2)} s` : "\u2013";
  const state = run ? run.error || (run.finished ? "ended" : run.state) : served.error ? `refused: ${served.error}` : "elsewhere";
  row.append(
    cell(name), cell(state), cell((run && run.instruction) || "\u2013"), cell(age),
    cell(served ? String(served.published) : "\u2013"), cell(served ? String(served.skipped) : "\u2013"),
  );
  return row;
}

async function showFleet() {
  try {
    const { runs, system2 } = await (await ask("/api/fleet")).json();
    const served = new Map(Object.entries((system2 && system2.robots) || {}));
    const rows = runs.map((run) => {
      const own = served.get(run.robot);
      served.delete(run.robot);
      return fleetRow(run.robot || run.run, run, own);
    });
    for (const [name, robot] of served) rows.push(fleetRow(name, null, robot));
    byId("fleet").hidden = rows.length < 2 && !system2;
    const count = `${rows.length} robot${rows.length === 1 ? "" : "s"}`;
    byId("fleet-line").textContent = !system2 ? count
      : system2.error ? `${count}; System 2: ${system2.error}`
        : `${count}; System 2 gives each ${system2.hz} latent${system2.hz === 1 ? "" : "s"} per second, ${system2.published} so far`;
    byId("robots").replaceChildren(...rows);
  } catch {
    // What is wrong with the server is told by `refresh`.
  } finally {
    setTimeout(showFleet, FLEET_MS);
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
byId("talk").addEventListener("submit", (event) => {
  event.preventDefault();
  say(byId("text").value);
});
for (const button of document.querySelectorAll("button.word")) {
  button.addEventListener("click", () => say(button.dataset.word));
}
window.addEventListener("resize", drawAges);
takeTokenFromAddress();
refresh();
showFleet();
