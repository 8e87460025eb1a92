//! How long things take, and how surely that is known: loads, records of every query, and what they say.
//!
//! Latency counts from when a query was due, whether or not it could be sent then. Every query leaves a [`record::Record`]; figures and
//! reports are made of those alone. Settings are compared in [`turns`], of which a [`sweep`] and [`settings`] tell. It knows nothing of
//! the command line.

pub mod about;
pub mod arrivals;
pub mod compare;
pub mod cost;
pub mod drawn;
pub mod energy;
pub mod environment;
pub mod figures;
pub mod foreign;
pub mod html;
pub mod http;
pub mod keep;
pub mod limits;
pub mod load;
pub mod local;
pub mod log;
pub mod memory;
pub mod record;
pub mod report;
pub mod settings;
pub mod slope;
pub mod stages;
pub mod startup;
pub mod statistics;
pub mod sweep;
pub mod truths;
pub mod turns;

mod document;
mod error;

pub use error::BenchError;
pub(crate) use error::number;
