// A picture → its caption, answers about it, texts beside it, and where the time went.
// What a server says is put in as text, never as markup: it repeats what models and file names say.

const KEY = 'blip2.key', MAX_RETRIES = 2, MAX_WAIT_S = 30, LOOK_AGAIN_MS = 2000;
const STAGES = {
  queue: 'in line for the picture', decode_image: 'bytes to colours', preprocess: 'colours to normalised pixels',
  vision: 'image encoder', qformer: 'Q-Former and projection', match: 'texts beside the picture', prompt: 'text to tokens',
  waiting: 'in line for the language model', prefill: 'up to the first token',
  decode: 'token by token', other: 'between the stages',
};

const find = id => document.getElementById(id);
const within = (id, selector) => find(id).querySelector(selector);
const make = (name, properties = {}, ...children) => {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
};
const number = value => value.toFixed(value < 10 ? 2 : value < 100 ? 1 : 0);
const share = value => `${(value * 100).toFixed(1)} %`;

// Requests

class Refusal extends Error {
  constructor(message, status, type) {
    super(message);
    this.isMissing = status === 404 || type === 'not_found_error';
  }
}

const refusal = (error, status) => new Refusal(error?.message ?? `The server answered with status ${status}.`, status, error?.type);
const pause = seconds => new Promise(done => setTimeout(done, seconds * 1000));

// Ends with the signal, whatever becomes of the promise.
function unless(signal, promise) {
  return new Promise((done, fail) => {
    signal.throwIfAborted();
    signal.addEventListener('abort', () => fail(signal.reason), { once: true });
    promise.then(done, fail);
  });
}

const unstopped = () => ({ signal: new AbortController().signal, say: () => {} });

// Asks for a key as often as one is refused, and comes back to a busy server twice.
async function request(path, init = {}, { signal, say } = unstopped()) {
  for (let n_retries = 0; ;) {
    const key = sessionStorage.getItem(KEY);
    const response = await send(path, { ...init, signal }, key);
    if (response.ok) return response;
    const refused = refusal((await response.json().catch(() => null))?.error, response.status);
    if (response.status === 401) await unless(signal, newKey(key, refused));
    else if (response.status === 429 && n_retries++ < MAX_RETRIES) await unless(signal, free(response, say));
    else throw refused;
    say('');
  }
}

async function send(path, init, key) {
  const headers = { ...init.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  try {
    return await fetch(path, { ...init, headers });
  } catch (error) {
    throw init.signal.aborted ? error : new Refusal('The server cannot be reached.');
  }
}

function free(response, say) {
  const seconds = Math.min(Number(response.headers.get('retry-after')) || 1, MAX_WAIT_S);
  say(`The server is busy; trying again in ${seconds} s.`);
  return pause(seconds);
}

let asking = null;

function newKey(used, refused) {
  if (sessionStorage.getItem(KEY) !== used) return Promise.resolve();
  asking ??= new Promise((done, fail) => {
    const dialog = find('key');
    within('key', '[role=alert]').textContent = used ? refused.message : '';
    dialog.returnValue = '';
    dialog.addEventListener('close', () => {
      const input = within('key', 'input'), key = dialog.returnValue && input.value.trim();
      asking = null;
      input.value = '';
      if (!key) return fail(refused);
      sessionStorage.setItem(KEY, key);
      done();
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

const posted = value => ({ method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(value) });

function outcome(result) {
  if (result?.error) throw refusal(result.error);
  if (!result) throw new Refusal('The answer broke off.');
  return result;
}

// Text is added to `into` as it comes.
async function streamed(path, body, into, job) {
  const response = await request(path, posted({ ...body, stream: true }), job);
  let result = null;
  for await (const data of events(response.body)) {
    if (data === '[DONE]') break;
    const event = JSON.parse(data);
    if (event.error) throw refusal(event.error);
    if (event.text) into.append(event.text);
    if (event.result) result = event.result;
  }
  into.textContent = outcome(result).text;
  return result;
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (let rest = ''; ;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const lines = block.split(/\r?\n/).filter(line => line.startsWith('data:'));
        if (lines.length) yield lines.map(line => line.slice(5).trim()).join('\n');
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// The picture

let picture = null;

function take(file) {
  for (const job of jobs) job.end();
  picture?.life.abort();
  URL.revokeObjectURL(picture?.address);
  picture = { file, address: URL.createObjectURL(file), life: new AbortController(), seen: new Map() };
  show(picture);
  find('caption-text').textContent = '';
  find('exchanges').replaceChildren();
  find('matches').replaceChildren();
  find('times').hidden = true;
  if (modelFor('caption')) caption.start();
}

function show({ file, address }) {
  const [image, hint] = find('frame').children;
  image.onload = () => { image.hidden = false; hint.textContent = ''; };
  image.onerror = () => { image.hidden = true; hint.textContent = `This browser cannot show ${file.name}; the server may.`; };
  image.src = address;
  image.alt = file.name;
  find('frame').classList.add('full');
  for (const sample of find('samples').children) sample.ariaPressed = String(sample.file === file);
}

const offer = files => files[0] && !find('key').open && take(files[0]);

function listen() {
  const frame = find('frame'), hasFiles = event => event.dataTransfer.types.includes('Files');
  for (const input of document.querySelectorAll('input[type=file]')) {
    input.addEventListener('change', () => { offer([...input.files]); input.value = ''; });
  }
  frame.addEventListener('click', () => document.querySelector('input[type=file]').click());
  document.addEventListener('paste', event => offer(event.clipboardData.files));
  document.addEventListener('dragover', event => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    frame.classList.add('over');
  });
  document.addEventListener('dragleave', event => event.relatedTarget || frame.classList.remove('over'));
  document.addEventListener('drop', event => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    frame.classList.remove('over');
    offer(event.dataTransfer.files);
  });
}

// A model looks at a picture once, and keeps what it saw for a while.
function look(picture, model, say) {
  if (!picture.seen.has(model.id)) {
    const body = new FormData();
    body.append('model', model.id);
    body.append('image', picture.file, picture.file.name);
    const job = { signal: picture.life.signal, say };
    const answer = request('images', { method: 'POST', body }, job).then(response => response.json());
    answer.catch(() => picture.seen.delete(model.id));
    picture.seen.set(model.id, answer);
  }
  return picture.seen.get(model.id);
}

// What `ask` says about the picture that is seen, or sent again where the server has forgotten it.
async function about(picture, model, ask, job) {
  try {
    const looked = await unless(job.signal, look(picture, model, job.say));
    const result = await ask({ image_id: looked.image_id });
    const timings = sum(looked.timings_ms ?? {}, result.timings_ms ?? {});
    looked.timings_ms = {};
    return { ...result, timings_ms: timings };
  } catch (error) {
    if (!error.isMissing) throw error;
    picture.seen.delete(model.id);
    return ask({ data: await base64(picture.file) });
  }
}

const sum = (first, second) => {
  const both = { ...first };
  for (const [stage, time] of Object.entries(second)) both[stage] = (both[stage] ?? 0) + time;
  return both;
};

const base64 = file => new Promise((done, fail) => {
  const reader = new FileReader();
  reader.onload = () => done(reader.result.slice(reader.result.indexOf(',') + 1));
  reader.onerror = () => fail(new Refusal('The file cannot be read any more.'));
  reader.readAsDataURL(file);
});

// Work that the button of a form starts, and stops while it runs.

function work(id, task) {
  const form = find(id), button = within(id, 'button'), status = within(id, '.status'), label = button.textContent;
  let running = null;
  const say = (text, isBad = false) => { status.textContent = text; status.classList.toggle('bad', isBad); };
  const turn = controller => {
    running?.abort();
    running = controller;
    button.textContent = controller ? 'Stop' : label;
    button.type = controller ? 'button' : 'submit';
    say('');
  };
  const start = async () => {
    if (!picture) return say('Choose a picture first.', true);
    const controller = new AbortController(), isLatest = () => running === controller;
    turn(controller);
    let last = [];
    try {
      last = [await task(picture, { signal: controller.signal, say: text => isLatest() && say(text) })];
    } catch (error) {
      last = controller.signal.aborted ? ['Stopped.'] : [sentence(error), true];
    }
    if (!isLatest()) return;
    turn(null);
    say(...last);
  };
  form.addEventListener('submit', event => { event.preventDefault(); start(); });
  button.addEventListener('click', event => {
    if (button.type !== 'button') return;
    // By the time that the browser acts on the click, the button submits again.
    event.preventDefault();
    // The second click of a double click does not stop what the first one started.
    if (event.detail < 2) running.abort();
  });
  return { start, end: () => turn(null) };
}

function sentence(error) {
  if (error instanceof Refusal) return error.message;
  console.error(error);
  return 'The answer broke off.';
}

async function written(task, picture, body, into, job) {
  const model = modelFor(task), chosen = options();
  into.textContent = '';
  into.ariaBusy = 'true';
  try {
    const ask = image => streamed(task, { model: model.id, images: [image], options: chosen, ...body }, into, job);
    const result = await about(picture, model, ask, job);
    showTimes(task, model, result.timings_ms);
    return summary(result);
  } finally {
    into.ariaBusy = 'false';
  }
}

function summary({ tokens, finish_reason, timings_ms, warnings = [] }) {
  const n_tokens = tokens?.length ?? tokens, total = timings_ms.total;
  return [n_tokens && `${n_tokens} tokens`, total && `${number(total)} ms`, finish_reason === 'length' && 'cut off at the limit', ...warnings]
    .filter(Boolean).join(' · ');
}

function options() {
  const form = find('options');
  if (!form.checkValidity()) {
    within('options', 'details').open = true;
    form.reportValidity();
    throw new Refusal('One of the options is out of its range.');
  }
  const typed = [...new FormData(form)].filter(([, value]) => value !== '');
  return Object.fromEntries(typed.map(([name, value]) => [name, name === 'sample' || Number(value)]));
}

const caption = work('caption', (picture, job) => written('caption', picture, {}, find('caption-text'), job));

const ask = work('ask', async (picture, job) => {
  const input = find('question'), question = input.value.trim();
  if (!question) throw new Refusal('Type a question first.');
  const answer = make('p', { className: 'answer' });
  const exchange = make('li', {}, make('p', { className: 'soft' }, question), answer);
  find('exchanges').prepend(exchange);
  try {
    const said = await written('ask', picture, { question }, answer, job);
    if (input.value.trim() === question) input.value = '';
    return said;
  } finally {
    if (!answer.textContent) exchange.remove();
  }
});

const match = work('match', async (picture, job) => {
  const texts = [...new Set(find('texts').value.split('\n').map(text => text.trim()).filter(Boolean))], model = modelFor('match');
  if (!texts.length) throw new Refusal('Type a text first.');
  const compare = async image => {
    const response = await request('match', posted({ model: model.id, images: [image], texts }), job);
    return outcome((await response.json()).results[0]);
  };
  const result = await about(picture, model, compare, job);
  const rows = result.matches.sort((one, other) => other.itm_probability - one.itm_probability);
  find('matches').replaceChildren(...rows.map(row => make('li', {}, make('p', {}, row.text),
    bar('Match (ITM)', row.itm_probability, share), bar('Similarity (ITC)', row.itc_similarity, value => value.toFixed(3)))));
  showTimes('match', model, result.timings_ms);
  return summary(result);
});

const jobs = [caption, ask, match];

function bar(label, value, words) {
  const fill = make('i');
  fill.style.width = share(Math.max(value ?? 0, 0)).replace(' ', '');
  return make('div', { className: 'bar' }, make('span', { className: 'soft' }, label),
    make('span', {}, typeof value === 'number' ? words(value) : '–'), make('span', { className: 'track', ariaHidden: 'true' }, fill));
}

function showTimes(task, model, { total, ...stages }) {
  const rows = Object.entries(stages), known = rows.reduce((sum, [, time]) => sum + time, 0), whole = Math.max(total ?? known, known);
  if (whole - known > whole / 1000) rows.push(['other', whole - known]);
  const coloured = (stage, node) => { node.style.background = `var(--${stage}, var(--edge))`; return node; };
  within('times', '.stack').replaceChildren(...rows.map(([stage, time]) => {
    const part = coloured(stage, make('i', { title: `${stage}: ${number(time)} ms` }));
    part.style.flexGrow = time;
    return part;
  }));
  const line = (name, about, time) => make('tr', {}, make('th', { scope: 'row' }, ...name), make('td', { className: 'what' }, about),
    make('td', {}, number(time)), make('td', {}, share(whole ? time / whole : 0)));
  within('times', 'tbody').replaceChildren(
    ...rows.map(([stage, time]) => line([coloured(stage, make('span', { className: 'swatch' })), stage.replaceAll('_', ' ')], STAGES[stage] ?? '', time)),
    line(['total'], '', whole));
  within('times', '.by').textContent = `${task}, ${model.id}`;
  find('times').hidden = !rows.length;
}

// Models

let models = [];

// The chosen one, or the first that can do the task.
function modelFor(task) {
  const able = models.filter(model => model.tasks.includes(task));
  return able.find(model => model.id === find('model').value) ?? able[0];
}

function showModels() {
  const select = find('model'), shown = new Set([...select.options].map(({ value }) => value));
  select.append(...models.filter(({ id }) => !shown.has(id)).map(({ id }) => make('option', { value: id }, id)));
  find('choice').hidden = models.length < 2;
  showUse();
}

function showUse() {
  const used = new Set();
  for (const task of ['caption', 'ask', 'match']) {
    const model = modelFor(task), other = model && model.id !== find('model').value;
    find(task).closest('section').hidden = !model;
    within(task, '.by').textContent = other ? `by ${model.id}` : '';
    if (model) used.add(model);
  }
  const demos = [...used].filter(model => model.is_demo).map(({ id }) => id).join(', ');
  notify(demos && `This is a demo (${demos}): it knows only coloured shapes drawn by this project. Ordinary photographs are beyond it.`);
}

function notify(text, canTryAgain = false) {
  within('notice', 'p').textContent = text;
  within('notice', 'button').hidden = !canTryAgain;
  find('notice').hidden = !text;
}

async function showSamples() {
  const { samples } = await (await request('samples')).json();
  find('samples').hidden = !samples.length;
  for (const { name, url } of samples) {
    const button = make('button', { type: 'button', title: name, ariaLabel: `Sample ${name}`, ariaPressed: 'false' });
    find('samples').append(button);
    fill(button, name, url).catch(() => button.remove());
  }
}

// An address in the page carries no key, so the picture is fetched.
async function fill(button, name, url) {
  const blob = await (await request(url.replace(/^\//, ''))).blob();
  button.file = new File([blob], name, { type: blob.type });
  button.append(make('img', { alt: '', src: URL.createObjectURL(blob) }));
  button.addEventListener('click', () => take(button.file));
}

async function start() {
  const main = document.querySelector('main');
  let all = [];
  try {
    all = (await (await request('v1/models')).json()).data;
  } catch (error) {
    return notify(sentence(error), true);
  }
  models = all.filter(({ state }) => state === 'ready');
  if (models.length) showModels();
  else notify('No model is loaded yet; looking again.');
  if (models.length && main.hidden) {
    await showSamples().catch(() => {});
    main.hidden = false;
  }
  if (!models.length || all.some(({ state }) => state === 'loading')) setTimeout(start, LOOK_AGAIN_MS);
}

listen();
find('model').addEventListener('change', showUse);
find('options').elements.sample.addEventListener('change', event => { within('options', 'fieldset').disabled = !event.target.checked; });
within('key', '[type=button]').addEventListener('click', () => find('key').close(''));
within('notice', 'button').addEventListener('click', start);
start();
