//! BLIP-2 on ONNX Runtime: a frozen image encoder, a Q-Former and a frozen language model, run from Rust without Python.
//!
//! ```text
//! bytes ─pixels→ Pixels ─vision→ ImageFeatures ─qformer→ Queries ┐
//!                                                                ├─language→ Prefix ─decode→ TokenId… ─text→ String
//! task, question ───────────────prompt + text──────────→ Prompt  ┘
//! ```
//!
//! [`engine::Engine`] composes the arrows. It splits where a picture is seen and nothing is asked yet: `see` looks at pictures, `ask` writes
//! texts about what was seen, so that several questions cost one image pass; `rank`, matching and the embeddings start there too.
//! A Q-Former that reads questions waits for them with the [`vision::ImageFeatures`]; that of stage 1 ([`stage1`]) compares pictures with
//! texts, and hands its own writer keys and values in the place of queries. The two halves, [`Seer`] and [`Writer`], may have a thread each.
//!
//! Many requests are written together. `join` puts one in line, every `step` runs the language model once for all that are live and hands
//! out what it settled, `leave` gives one up; `ask` composes the three. Rows are computed, slots hold keys and values
//! ([`language::rows`]): a row that is gone costs nothing, and no slot moves when another comes.
//!
//! ```no_run
//! use blip2::{Engine, Generation, Picture, Task};
//!
//! let mut engine = Engine::open("models/demo-opt".as_ref(), &Default::default())?;
//! let picture = Picture::open("models/samples/0.png".as_ref(), &Default::default())?;
//! let answer = engine.answer(&picture, Task::Caption, Generation::default())?;
//! println!("{}", answer.text);
//! # Ok::<(), blip2::Error>(())
//! ```
//!
//! A [`service`] puts one engine to work for many callers, on threads, in one line that is as long as it may be; a [`server`] puts services
//! behind HTTP; [`mod@bench`] measures them, or a server elsewhere, by the records that queries leave.
//!
//! # Doors
//!
//! Each outside library is used in one place: `ort` and `half` in [`runtime`], what decodes pictures in [`pixels`], `tokenizers` in [`text`],
//! `prost` in [`bundle`], `statrs` in [`mod@bench`], `axum` and `tokio` in [`server`], `ureq` in both, `clap` and `ndarray-npy` in [`cli`]. Dependencies point
//! down: `cli → verify, server, bench → service → engine → prompt, language, stage1, qformer, vision → runtime, text → bundle → pixels`; [`decode`] knows nothing
//! of tensors and defines the small trait that [`language`] implements. `tests/layers.rs` holds this.
//!
//! # Invariants
//!
//! - Facts about a model live in its `bundle.json`. They are checked once, in [`bundle`]; no code asks a model its name.
//! - Knowledge of the language model's family begins at [`language::Prefix`].
//! - One loop ([`decode::StepLoop`]) drives every live request; the same request gives the same tokens alone and beside others.
//! - What a run settles is handed out before the next. A failure ends the requests it belongs to and no other.
//! - The KV cache is written in place; a decode step allocates no tensor while the number of rows stays.
//! - Tensors stay where graphs run. Copies between host and device happen where tensors are bound, and are counted.
//! - A provider that was asked for runs or is an error, never a quiet CPU run.
//! - Nothing is reported to anybody. ONNX Runtime would, unless `ORT_DISABLE_TELEMETRY=1` is in the environment when it is loaded: the program
//!   sees to that, other programs set it.
//!
//! # To add X, touch Y
//!
//! | to add | touch |
//! |---|---|
//! | a checkpoint of a known shape | nothing here: a bundle |
//! | a language model of a new shape | a [`bundle::Family`], what its decoder reads first in `language/mod.rs`, its graph in `export/` |
//! | an execution provider | `runtime/provider.rs`, a feature in `Cargo.toml`; one that is a plugin: a line in `runtime/plugin.rs` |
//! | a decoding strategy | `decode/<name>.rs` with a [`decode::Search`] |
//! | a route | `server/routes/<name>.rs`, a line in `server/routes/mod.rs` for the router and one for the document |
//! | a command | `cli/<name>.rs`, a variant in `cli/args.rs` |
//! | an operator in graphs | `export/`; what it makes of sizes in `bench/cost/shapes.rs`, and what it costs if it multiplies in `products.rs` |
//! | what is measured | a [`bench::load::Target`]; a scenario: a variant in `cli/bench.rs` |
//! | results in another tool's form | `bench/foreign/<name>.rs`, a variant of [`bench::foreign::Format`] |
//! | what `cargo bench` times, beside the obvious way | `benches/<name>.rs`, its `[[bench]]` in `Cargo.toml` |

pub mod bench;
pub mod bundle;
pub mod cli;
pub mod decode;
pub mod engine;
pub mod language;
pub mod pixels;
pub mod prompt;
pub mod qformer;
pub mod runtime;
pub mod server;
pub mod service;
pub mod stage1;
pub mod text;
pub mod timing;
pub mod verify;
pub mod vision;

mod error;

pub use engine::{Answer, Candidate, Engine, Event, Generation, Match, Ranked, Request, RequestId, Seer, Sight, Writer};
pub use error::Error;
pub use pixels::Picture;
pub use prompt::Task;
