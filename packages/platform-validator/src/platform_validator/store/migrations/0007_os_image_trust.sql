-- How the OS image of a CVM came to be trusted, as its receipts tell it (JSON); NULL: no quote, or from before.

ALTER TABLE cvms_journal ADD COLUMN os_image TEXT;
