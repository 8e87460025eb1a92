//! What is written to standard error.

use std::io::{IsTerminal, stderr};

use tracing::level_filters::LevelFilter;

use super::config::{LogConfig, LogFormat};

/// Begins to write. What the crates below say is not for whoever runs a server, but for errors.
pub fn start(config: &LogConfig) {
    let level = config.level.parse().unwrap_or(LevelFilter::INFO);
    let log = tracing_subscriber::fmt().with_writer(stderr).with_max_level(level).with_target(false);
    // A process has one; who has begun another keeps it.
    let _ = match config.format {
        LogFormat::Text => tracing::subscriber::set_global_default(log.with_ansi(stderr().is_terminal()).finish()),
        LogFormat::Json => tracing::subscriber::set_global_default(log.json().flatten_event(true).finish()),
    };
}
