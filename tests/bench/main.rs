//! `blip2 bench` as its users meet it.

#![allow(clippy::unwrap_used)]

mod browser;
mod page;
mod program;
mod recorded;
mod scenarios;
mod stages;
mod turns;
