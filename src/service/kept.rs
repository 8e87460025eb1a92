//! What was made of pictures, kept for when they come again.

use std::sync::atomic::{AtomicU64, Ordering};

use moka::sync::Cache;

use crate::engine::Sight;
use crate::pixels::Picture;

/// Looks at pictures that were paid for once, in bounded memory; the least recently used go first. Each owner has its own: nobody can find
/// out what others have shown.
pub(super) struct Kept {
    sights: Option<Cache<Key, Sight>>,
    /// Drawn anew by every process, so that nobody can make two pictures with one hash.
    secret: [u8; 32],
    hits: AtomicU64,
    misses: AtomicU64,
}

/// A keyed hash of whose picture it is, its sizes and everything that was decoded.
pub(super) type Key = [u8; 32];

impl Kept {
    /// Keeps so many bytes; with none it keeps nothing.
    pub fn new(bytes: u64) -> Self {
        let weigh = |_: &Key, sight: &Sight| u32::try_from(sight.n_bytes()).unwrap_or(u32::MAX);
        let sights = (bytes > 0).then(|| Cache::builder().max_capacity(bytes).weigher(weigh).build());
        Self { sights, secret: rand::random(), hits: AtomicU64::new(0), misses: AtomicU64::new(0) }
    }

    /// Where a picture is kept, if anything is.
    pub fn key(&self, owner: u64, picture: &Picture) -> Option<Key> {
        self.sights.as_ref()?;
        let mut hasher = blake3::Hasher::new_keyed(&self.secret);
        for number in [owner, picture.width.into(), picture.height.into(), picture.alpha().is_some().into()] {
            hasher.update(&number.to_le_bytes());
        }
        hasher.update(&picture.rgb).update(picture.alpha().unwrap_or_default());
        Some(*hasher.finalize().as_bytes())
    }

    /// What was made of a picture. Its times are those of the first look, so they are left out.
    pub fn get(&self, key: &Key) -> Option<Sight> {
        let found = self.sights.as_ref()?.get(key).map(Sight::without_timings);
        let counter = if found.is_some() { &self.hits } else { &self.misses };
        counter.fetch_add(1, Ordering::Relaxed);
        found
    }

    /// Keeps what was made of a picture.
    pub fn keep(&self, key: Key, sight: &Sight) {
        if let Some(sights) = &self.sights {
            sights.insert(key, sight.clone());
        }
    }

    /// How often something was found and not found, and the bytes that are kept.
    pub fn counts(&self) -> (u64, u64, u64) {
        let bytes = self.sights.as_ref().map_or(0, Cache::weighted_size);
        (self.hits.load(Ordering::Relaxed), self.misses.load(Ordering::Relaxed), bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_differ_by_owner_sizes_and_every_sample() {
        let kept = Kept::new(1);
        let picture = |width, height, rgb: &[u8]| Picture::from_rgb(width, height, rgb.to_vec());
        let one = picture(2, 1, &[1, 2, 3, 4, 5, 6]);
        let others = [
            kept.key(2, &one),
            kept.key(1, &picture(1, 2, &[1, 2, 3, 4, 5, 6])),
            kept.key(1, &picture(2, 1, &[1, 2, 3, 4, 5, 7])),
            Kept::new(1).key(1, &one),
        ];
        assert_eq!(kept.key(1, &one), kept.key(1, &one.clone()));
        assert!(others.iter().all(|other| *other != kept.key(1, &one) && other.is_some()));
        assert_eq!(Kept::new(0).key(1, &one), None);
    }
}
