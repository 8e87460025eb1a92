//! Tensors and rows on the processor and on a device. The device is one in software, which `make setup-webgpu` installs; without it the
//! tests of the device say so and pass.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use blip2::bundle::Family;
use blip2::decode::{EarlyStopping, Processors, Strategy, TokenId, Warpers};
use blip2::engine::Flow;
use blip2::pixels::Limits;
use blip2::runtime::{
    Copies, Fallback, Move, Mover, Plugin, Provider, ProviderChoice, ProviderError, Row, Runtime, RuntimeOptions, Tensor,
    UnavailableError,
};
use blip2::{Engine, Generation, Picture, Request, Task, verify};
use ndarray::{Array3, Array4, ArrayD, Axis};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_path_buf()
}

fn processor() -> Runtime {
    Runtime::load(&RuntimeOptions { provider: ProviderChoice::Only(Provider::Cpu), ..RuntimeOptions::default() }).unwrap()
}

fn options(fallback: Fallback) -> RuntimeOptions {
    let provider = ProviderChoice::Only(Provider::Plugin(Plugin::named("webgpu")));
    let ep_library = std::env::var_os("BLIP2_EP_LIBRARY").map(PathBuf::from);
    RuntimeOptions { provider, ep_library, fallback, ..RuntimeOptions::default() }
}

fn device(fallback: Fallback) -> Runtime {
    Runtime::load(&options(fallback)).unwrap()
}

/// This program, with Vulkan told of its device: by variables that must be set before the process starts.
fn with_device(args: &[&str]) -> String {
    let software = root().join("target/swiftshader");
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(args)
        .env("VK_ICD_FILENAMES", software.join("vk_swiftshader_icd.json"))
        .env("LD_LIBRARY_PATH", &software)
        .env("ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER", "1")
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].map(|said| String::from_utf8_lossy(&said).into_owned()).concat();
    assert!(output.status.success(), "{args:?}: {}: {said}", output.status);
    said
}

/// The plugin bears one thread at a time, so every test runs in a process of its own, two of them at once.
#[test]
fn everything_works_on_a_device() {
    if !root().join("target/swiftshader/.stamp").exists() {
        return eprintln!("skipped: there is no device in software; `make setup-webgpu` installs it");
    }
    if let Err(UnavailableError::Provider(error @ ProviderError::NoPlugin { .. })) = Runtime::load(&options(Fallback::Operators)) {
        return eprintln!("skipped: {error}");
    }
    let listed = with_device(&["--ignored", "--list"]);
    let tests: Vec<&str> = listed.lines().filter_map(|line| line.strip_suffix(": test")).collect();
    assert_eq!(tests.len(), 8, "{listed}");
    let pending = Mutex::new(tests.into_iter());
    let next = || pending.lock().unwrap().next();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(test) = next() {
                    let said = with_device(&["--ignored", "--exact", test]);
                    assert!(said.contains("1 passed"), "{said}");
                }
            });
        }
    });
}

fn numbered(shape: [usize; 4]) -> Array4<f32> {
    Array4::from_shape_fn(shape, |(row, head, position, place)| (row * 1000 + head * 100 + position * 10 + place) as f32)
}

const MOVES: [Move; 3] = [
    Move { from: 1, to: 0, start: 2, end: 5 },
    Move { from: 1, to: 4, start: 0, end: 7 },
    Move { from: 3, to: 2, start: 6, end: 6 },
];

fn moved(from: &Array4<f32>, mut into: Array4<f32>) -> Array4<f32> {
    for step in MOVES {
        for position in step.start..step.end {
            let source = from.index_axis(Axis(0), step.from);
            let source = source.index_axis(Axis(1), position);
            into.index_axis_mut(Axis(0), step.to).index_axis_mut(Axis(1), position).assign(&source);
        }
    }
    into
}

fn rows_move(runtime: &Runtime) {
    let mut mover = Mover::new(runtime);
    let (from, into) = (numbered([4, 3, 9, 4]), -numbered([5, 3, 7, 4]));
    let bring = |mover: &mut Mover, values: &Array4<f32>| {
        let tensor = Tensor::from_f32(values.clone()).unwrap();
        mover.to_device(&tensor).unwrap()
    };
    let (source, mut target) = (bring(&mut mover, &from), bring(&mut mover, &into));
    let before = runtime.copies();
    mover.copy(&source, &mut target, &MOVES).unwrap();
    mover.copy(&source, &mut target, &MOVES).unwrap();
    let moved_by = runtime.copies() - before;
    assert_eq!(mover.to_host(&target).unwrap().to_f32().unwrap(), moved(&from, into.clone()).into_dyn());

    let mut alone = bring(&mut mover, &into);
    mover.copy_within(&mut [&mut alone], &MOVES).unwrap();
    assert_eq!(mover.to_host(&alone).unwrap().to_f32().unwrap(), moved(&into, into.clone()).into_dyn());

    let (sources, mut targets) =
        ([0.5, 2.0].map(|by| bring(&mut mover, &(&from * by))), [1.0, 3.0].map(|by| bring(&mut mover, &(&into * by))));
    mover.copy_all(&sources.each_ref(), &mut targets.each_mut(), &MOVES).unwrap();
    for (target, [a, b]) in targets.iter().zip([[0.5, 1.0], [2.0, 3.0]]) {
        assert_eq!(mover.to_host(target).unwrap().to_f32().unwrap(), moved(&(&from * a), &into * b).into_dyn());
    }

    // Where to: 3 heads of 3 and of 7 positions, 3 numbers of 8 bytes, once for reading and once for writing, and once for both calls.
    let lists = if source.is_on_host() { 0 } else { 2 };
    let expected = Copies { n_up: lists, bytes_up: lists * 3 * (3 + 7) * 3 * 8, ..Copies::default() };
    assert_eq!(moved_by, expected, "values never leave the place where they lie");
}

fn rows_stack(runtime: &Runtime) {
    let mut mover = Mover::new(runtime);
    let values = |n_rows: usize, base: f32| Array3::from_shape_fn((n_rows, 2, 5), |(r, q, h)| base + (r * 100 + q * 10 + h) as f32);
    let (first, second) = (values(3, 0.0), values(2, 5000.0));
    let mut bring = |values: &Array3<f32>| {
        let tensor = Tensor::from_f32(values.clone()).unwrap();
        Row::all(Arc::new(mover.to_device(&tensor).unwrap())).collect::<Vec<Row>>()
    };
    let (one, other) = (bring(&first), bring(&second));
    let before = runtime.copies();
    let batch = mover.stack(&[&one[2], &other[0], &one[0], &one[2]]).unwrap();
    assert_eq!((runtime.copies() - before).n_down, 0);
    let wanted = [(&first, 2), (&second, 0), (&first, 0), (&first, 2)].map(|(values, row)| values.index_axis(Axis(0), row));
    let found = mover.to_host(&batch).unwrap().to_f32().unwrap();
    assert_eq!(found, ndarray::stack(Axis(0), &wanted).unwrap().into_dyn());

    let whole = mover.stack(&one.iter().collect::<Vec<_>>()).unwrap();
    assert!(std::ptr::eq(&*whole, one[0].tensor()), "what is a tensor already is not copied");
    assert_eq!(mover.read(&other[1]).unwrap(), second.index_axis(Axis(0), 1).to_owned().into_dyn());
}

#[test]
fn rows_move_and_stack_on_the_processor() {
    rows_move(&processor());
    rows_stack(&processor());
    assert_eq!(processor().copies(), Copies::default());
}

#[test]
#[ignore = "everything_works_on_a_device runs it where there is one"]
fn rows_move_and_stack_on_a_device() {
    let runtime = device(Fallback::Nothing);
    rows_move(&runtime);
    rows_stack(&runtime);
}

#[test]
fn sixteen_bit_rows_move_too() {
    use blip2::bundle::Dtype;
    let mut mover = Mover::new(&processor());
    for dtype in [Dtype::Float16, Dtype::Bfloat16] {
        // Numbers that both types hold exactly.
        let values = numbered([4, 1, 7, 4]).mapv(|value| (value % 128.0) - 50.0);
        let tensor = |values: &Array4<f32>| Tensor::from_f32(values.clone()).unwrap().to_type(dtype).unwrap();
        let into = Array4::zeros([5, 1, 7, 4]);
        let (source, mut target) = (tensor(&values), tensor(&into));
        mover.copy(&source, &mut target, &MOVES).unwrap();
        assert!(target.is(dtype));
        assert_eq!(target.to_f32().unwrap(), moved(&values, into).into_dyn());
    }
}

fn largest_difference(found: &ArrayD<f32>, wanted: &ArrayD<f32>) -> f32 {
    found.iter().zip(wanted).fold(0.0, |largest, (found, wanted)| largest.max((found - wanted).abs()))
}

/// Image encoder and Q-Former, on `runtime`: features of two pictures, and queries.
fn see(runtime: &Runtime) -> [ArrayD<f32>; 2] {
    use blip2::{bundle::Bundle, pixels::Pixels, qformer::Qformer, vision::Vision};
    let bundle = Bundle::open(&root().join("tests/bundles/t5")).unwrap();
    let side = bundle.facts().image.size as usize;
    let (mut vision, mut qformer) = (Vision::open(runtime, &bundle).unwrap(), Qformer::open(runtime, &bundle).unwrap());
    let pixels = Array4::from_shape_fn((2, 3, side, side), |(picture, channel, y, x)| {
        ((picture * 31 + channel * 7 + y * 3 + x * x) % 17) as f32 / 8.0 - 1.0
    });
    let (before, n_bytes) = (runtime.copies(), pixels.len() as u64 * 4);
    let features = vision.encode(Pixels(pixels)).unwrap();
    let queries = qformer.read(&features, None).unwrap();
    let on_device = !features.0.is_on_host();
    let up = if on_device { Copies { n_up: 1, bytes_up: n_bytes, ..Copies::default() } } else { Copies::default() };
    assert_eq!(runtime.copies() - before, up, "pixels go up, and nothing comes down");
    let mut mover = Mover::new(runtime);
    let mut read = |row: &Row| mover.read(row).unwrap();
    [read(&features.rows().nth(1).unwrap().0), read(&queries[1].0)]
}

#[test]
#[ignore = "everything_works_on_a_device runs it where there is one"]
fn features_and_queries_stay_on_the_device() {
    let runtime = device(Fallback::Operators);
    let (found, wanted) = (see(&runtime), see(&processor()));
    for (stage, (found, wanted)) in ["features", "queries"].iter().zip(found.iter().zip(&wanted)) {
        let difference = largest_difference(found, wanted);
        assert!(found.shape() == wanted.shape() && difference < 1e-4, "{stage}: {difference:.1e}");
    }
}

#[test]
#[ignore = "everything_works_on_a_device runs it where there is one"]
fn operators_that_a_device_lacks_are_named() {
    use blip2::{bundle::Bundle, vision::Vision};
    let runtime = device(Fallback::Nothing);
    let bundle = Bundle::open(&root().join("models/demo-opt")).unwrap();
    let error = Vision::open(&runtime, &bundle).unwrap_err().to_string();
    assert!(error.contains("provider webgpu: it does not run FusedMatMul ("), "{error}");
}

fn engine(bundle: &str, options: &RuntimeOptions) -> Engine {
    Engine::open(&root().join("tests/bundles").join(bundle), options).unwrap()
}

/// Greedy, beams, and what draws continuations, of two pictures together.
fn texts(engine: &mut Engine) -> Vec<Vec<TokenId>> {
    let open = |index| Picture::open(&root().join(format!("models/samples/{index}.png")), &Limits::default()).unwrap();
    let sights = engine.see(&[&open(0), &open(1)]).unwrap();
    let beam =
        |sample| Strategy::Beam { beams: 3, length_penalty: 1.0, early_stopping: EarlyStopping::Unlikely, n_return: 1, sample };
    let strategies = [Strategy::Greedy, beam(None), beam(Some((Warpers::default(), 5)))];
    let generation = |strategy| Generation { max_new_tokens: Some(8), strategy, ..Generation::default() };
    let request = |(sight, strategy)| Request { sight, task: Task::Caption, generation: generation(strategy) };
    let all = sights.iter().flat_map(|sight| strategies.iter().map(move |strategy| (sight, strategy.clone())));
    let requests: Vec<Request<'_>> = all.map(request).collect();
    engine.ask(&requests, |_, _| Flow::Continue(())).into_iter().map(|answer| answer.unwrap().tokens).collect()
}

/// Every stage of the bundle's own records, and the same texts as on the processor, with few copies.
fn writes(bundle: &str) {
    let mut on_device = engine(bundle, &options(Fallback::Nothing));
    copies_little(&mut on_device);
    verify::run(&mut on_device, |check| assert!(check.holds, "{bundle}: {} {}", check.what, check.found)).unwrap();
    let mut on_processor = engine(bundle, &RuntimeOptions { provider: ProviderChoice::Only(Provider::Cpu), ..Default::default() });
    assert_eq!(texts(&mut on_device), texts(&mut on_processor), "{bundle}");
}

/// Per step, tokens and where they stand go up, and logits come down.
fn copies_little(engine: &mut Engine) {
    let picture = Picture::open(&root().join("models/samples/0.png"), &Limits::default()).unwrap();
    let sight = engine.see(&[&picture]).unwrap().remove(0);
    let (vocabulary, behind_encoder) = {
        let facts = engine.bundle().facts();
        (engine.bundle().language().vocab_size as u64, facts.family == Family::EncoderDecoder)
    };
    let processors = Processors { min_new_tokens: 8, ..Processors::default() };
    let generation = Generation { max_new_tokens: Some(8), processors, ..Generation::default() };
    let request = Request { sight: &sight, task: Task::Caption, generation };
    let ids = [engine.join(&request).unwrap(), engine.join(&request).unwrap()];
    (0..3).for_each(|_| drop(engine.step()));
    let before = engine.runtime().copies();
    let events = engine.step();
    assert_eq!(events.len(), 2);
    let found = engine.runtime().copies() - before;
    assert_eq!((found.n_down, found.bytes_down), (1, 2 * vocabulary * 4), "{found:?}");
    // Of each of two rows a token, a position, its slot and where its logits are wanted; of each slot a row and a length or two.
    let bytes = 2 * 4 * 8 + 2 * (8 + 4) + if behind_encoder { 2 * 4 } else { 0 };
    assert_eq!(found.bytes_up, bytes, "{found:?}");
    ids.iter().for_each(|id| drop(engine.leave(*id).unwrap()));
}

#[test]
#[ignore = "everything_works_on_a_device runs it where there is one"]
fn t5_writes_on_the_device() {
    writes("webgpu-t5");
}

#[test]
#[ignore = "everything_works_on_a_device runs it where there is one"]
fn llama_writes_on_the_device() {
    writes("webgpu-instruct-llama");
}

#[test]
#[ignore = "everything_works_on_a_device runs it where there is one"]
fn opt_writes_on_the_device() {
    writes("webgpu-vqa-opt");
}

#[test]
#[ignore = "everything_works_on_a_device runs it where there is one"]
fn a_qformer_writes_on_the_device() {
    writes("webgpu-stage1");
}

/// Of a plugin that is not known nothing tells where its tensors lie: they pass through the processor's memory at every run.
#[test]
#[ignore = "everything_works_on_a_device runs it where there is one"]
fn a_plugin_that_is_not_known_gives_the_same() {
    let ep_library = device(Fallback::Nothing).offer(Plugin::named("webgpu")).map(|offer| offer.path);
    let provider = ProviderChoice::Only(Provider::Plugin(Plugin::named("mine")));
    let options = RuntimeOptions { provider, ep_library, ..RuntimeOptions::default() };
    let mut unknown = engine("webgpu-t5", &options);
    verify::run(&mut unknown, |check| assert!(check.holds, "{} {}", check.what, check.found)).unwrap();
    let another = RuntimeOptions { ep_library: Some(root().join("README.md")), ..options };
    let error = Runtime::load(&another).unwrap_err().to_string();
    assert!(error.contains("cannot be loaded beside"), "{error}");
}
