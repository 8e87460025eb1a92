//! `blip2 serve` as its clients meet it: the binary, on loopback, on tiny bundles.

#![allow(clippy::unwrap_used)]

mod client;
mod faults;
mod grpc;
mod kserve;
mod load;
mod promises;
mod protocols;
mod safety;
mod traces;
